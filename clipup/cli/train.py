"""``clipup train``: trains a dense or sparse model."""

from __future__ import annotations

import dataclasses
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import tyro

from ..train.parallel.launched import Launched
from ..train.train_options import TrainOptions
from . import open_clip_flags, say
from .flags import flags, parse, refuse_idle, refuse_unknown_models
from .logs import in_one_line
from .outputs import check_directory

_DIVERGED, _REFUSED, _INTERRUPTED = 1, 2, 130


def _title(group: type) -> str:
    """Of a group of options in the help."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", group.__name__.removesuffix("Options")).lower()


_Grouped: Any = dataclasses.make_dataclass(
    "TrainOptions",
    [(_title(group), group, dataclasses.field(default_factory=group)) for group in TrainOptions.__bases__],
    namespace={"__doc__": TrainOptions.__doc__},
)
"""The options as the command line shows them: a field per group, without prefixes in the names of the flags."""
FLAGS = tuple(flags(_Grouped).values())
"""All flags of the command."""


def main(argv: list[str]) -> int:
    """Returns 0, 1 when loss, gradients or weights are not finite, 130 after Ctrl-C, SIGTERM or SIGHUP (with a
    checkpoint to continue from)."""
    options = _parse(argv)
    if options.logs is None:
        raise ValueError("logs: got None, with which nothing is saved and which is for Python only: pass a directory")
    check_directory("logs", options.logs)
    from ..train import TrainingInterrupted, train
    from ..train.parallel.ranks import ElsewhereRaised

    try:
        result = train(options)
    except (FloatingPointError, TrainingInterrupted) as error:
        if Launched.from_environment().rank == 0:  # all ranks raise it
            say(f"clipup train: {in_one_line(str(error))}")
        return _DIVERGED if isinstance(error, FloatingPointError) else _INTERRUPTED
    except Exception as error:
        if isinstance(error.__cause__, ElsewhereRaised):
            return _REFUSED
        raise
    if Launched.from_environment().rank != 0:
        return 0
    if result.already_finished:
        print(
            f"the run in {result.directory} was already finished at step {result.steps}; nothing was changed. To "
            "continue training set more --steps or --epochs"
        )
        return 0
    last = result.history[-1] if result.history else {}
    text = "" if last.get("loss") is None else f", last loss {last['loss']:.4f}"
    counts = {"steps not applied": last.get("skipped_steps"), "samples skipped": result.skipped}
    text += "".join(f", {count} {what}" for what, count in counts.items() if count)
    print(f"{result.steps} steps in {result.seconds:.0f} s of training{text}; see {result.directory}")
    return 0


def _parse(argv: list[str]) -> TrainOptions:
    """The options; one rank per machine prints help and errors."""
    if Launched.from_environment().local_rank == 0:
        return _options(argv)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            return _options(argv)
        except ValueError as error:
            raise SystemExit(_REFUSED) from error


def _options(argv: list[str]) -> TrainOptions:
    """The options of a command line.

    Raises:
        ValueError: an option has a wrong value, no effect, or is one of open_clip_train's that there is not.
        SystemExit: --help, or what is no option.
    """
    open_clip_flags.refuse(argv, FLAGS)
    groups = vars(parse(_Grouped, argv, "clipup train", config=(tyro.conf.OmitArgPrefixes,))).values()
    options = TrainOptions(**{name: value for group in groups for name, value in vars(group).items()})
    refuse_unknown_models(options)
    refuse_idle(argv, options.idle())
    return options
