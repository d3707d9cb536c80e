"""``clipup train``: trains a dense or sparse model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from copy import copy
from dataclasses import field, fields, make_dataclass
from io import StringIO
from typing import Any, get_type_hints

import tyro

from ..moe.config import MoEConfig
from ..train.parallel.launched import Launched
from ..train.train_options import GROUPS, TrainOptions
from . import open_clip_flags, say
from .flags import flags, join_help, parse, refuse_idle
from .logs import in_one_line
from .outputs import check_directory

_DIVERGED, _REFUSED, _INTERRUPTED = 1, 2, 130


_COMMON = ("model", "pretrained", "moe", "train_data", "val_data", "batch_size", "lr", "steps", "precision", "name")
"""The options that most runs need. The help shows them before the groups that they belong to."""

join_help(TrainOptions)
_KINDS: tuple[Any, ...] = (MoEConfig, *GROUPS.values())
_TYPES = {name: hint for kind in _KINDS for name, hint in get_type_hints(kind, include_extras=True).items()}
_FIELDS = {each.name: copy(each) for kind in _KINDS for each in fields(kind)}
for _name, _default in vars(MoEConfig.clip_up()).items():
    _FIELDS[_name].default = _default


def _shown(title: str, description: str | None, options: Iterable[str]) -> tuple[str, type, Any]:
    """A group of options in the help, as a field of ``_Grouped``."""
    members = [(name, _TYPES[name], _FIELDS[name]) for name in options]
    group = make_dataclass(title, members, namespace={"__doc__": description})
    return title, group, field(default_factory=group)


_Grouped: Any = make_dataclass(
    "TrainOptions",
    [
        _shown("common", "Those that most runs need.", _COMMON),
        *(
            _shown(title, group.__doc__, (name for name in flags(group) if name not in _COMMON))
            for title, group in GROUPS.items()
        ),
    ],
    namespace={"__doc__": TrainOptions.__doc__},
)
"""The options as the command line shows them: a field per group, without prefixes in the names of the flags. Those of
``MoEConfig`` are fields of a group like all others, so that it is ``MoEConfig`` that refuses a value, not tyro."""
FLAGS = tuple(flags(_Grouped).values())
"""All flags of the command."""


def main(argv: list[str]) -> int:
    """Returns 0, 1 when loss, gradients or weights are not finite, 130 after Ctrl-C, SIGTERM or SIGHUP (with a
    checkpoint to continue from)."""
    options = _parse(argv)
    if options.checkpoints.logs is None:
        raise ValueError("logs: got None, with which nothing is saved and which is for Python only: pass a directory")
    check_directory("logs", options.checkpoints.logs)
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
    values = {name: value for group in groups for name, value in vars(group).items()}
    moe_cfg = MoEConfig(**{name: values.pop(name) for name in flags(MoEConfig)})
    options = TrainOptions.flat(moe_cfg=moe_cfg, **values)
    refuse_idle(argv, options.idle())
    return options
