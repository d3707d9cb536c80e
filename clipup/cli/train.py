"""``clipup train``: trains a dense or sparse model."""

from __future__ import annotations

import dataclasses
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import tyro

from ..data.options import is_csv
from ..moe.config import MoEConfig
from ..train.options import GROUPS, TrainOptions
from ..train.ranks.launched import Launched
from . import open_clip_flags, say
from .flags import TRAIN_RULES, NoEffect, parse, refuse_idle, refuse_unknown_models
from .logs import FLAG_OF, in_one_line
from .outputs import check_directory

_DIVERGED, _REFUSED, _INTERRUPTED = 1, 2, 130

_Grouped: Any = dataclasses.make_dataclass(
    "TrainOptions",
    [
        ("model", GROUPS["model"], dataclasses.field(default_factory=GROUPS["model"])),
        ("sparse_layers", MoEConfig, dataclasses.field(default_factory=MoEConfig.clip_up)),
        *((name, group, dataclasses.field(default_factory=group)) for name, group in GROUPS.items() if name != "model"),
    ],
    namespace={"__doc__": TrainOptions.__doc__},
)
"""The options as the command line shows them: a field per group, without prefixes in the names of the flags."""

FLAGS = tuple(
    f"--{field.name.replace('_', '-')}"
    for field in (*dataclasses.fields(TrainOptions), *dataclasses.fields(MoEConfig))
    if field.name != "moe_cfg"
)
"""All flags of the command."""

RULES = [
    *TRAIN_RULES,
    NoEffect(
        ("csv_separator", "csv_img_key", "csv_caption_key"),
        lambda options: not (is_csv(options.train_data, options.dataset_type) or is_csv(options.val_data)),
        "without a CSV file",
    ),
    NoEffect(
        ("dataset_resampled",),
        lambda options: is_csv(options.train_data, options.dataset_type),
        "on a CSV file",
    ),
    NoEffect(("val_frequency",), lambda options: options.val_data is None, "without --val-data"),
    NoEffect(
        ("zeroshot_frequency",),
        lambda options: options.imagenet_val is None and options.imagenet_v2 is None,
        "without --imagenet-val or --imagenet-v2",
    ),
    NoEffect(("momentum",), lambda options: not options.opt.startswith("timm/"), "without --opt timm/NAME"),
    NoEffect(("fused",), lambda options: options.opt != "adamw", "without --opt adamw"),
    NoEffect(
        ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"),
        lambda options: options.lr_scheduler != "const-cooldown",
        "without --lr-scheduler const-cooldown",
    ),
    NoEffect(("loss_chunk_size",), lambda options: options.distill_model is not None, "with --distill-model"),
    NoEffect(("warmup", "lr_scheduler"), lambda options: options.skip_scheduler, "with --skip-scheduler"),
    NoEffect(("distill_pretrained",), lambda options: options.distill_model is None, "without --distill-model"),
    NoEffect(
        ("torchcompile_backend", "torchcompile_mode"),
        lambda options: not options.torchcompile,
        "without --torchcompile",
    ),
    NoEffect(
        ("torchcompile_mode",),
        lambda options: options.torchcompile_backend not in (None, "inductor"),
        "without the backend inductor",
    ),
    NoEffect(
        ("wandb_project_name",),
        lambda options: not options.trackers() & {"wandb", "trackio"},
        "without --report-to wandb or trackio",
    ),
    NoEffect(
        ("remote_sync_frequency",),
        lambda options: options.remote_sync is None,
        "without --remote-sync",
    ),
    NoEffect(("wandb_notes",), lambda options: "wandb" not in options.trackers(), "without --report-to wandb"),
    NoEffect(("force",), lambda options: options.resume == "latest", "with --resume latest"),
    NoEffect(("delete_previous_checkpoint",), lambda options: options.save_frequency == 0, "with --save-frequency 0"),
]


def main(argv: list[str]) -> int:
    """Returns 0, 1 when loss, gradients or weights are not finite, 130 after Ctrl-C, SIGTERM or SIGHUP (with a
    checkpoint to continue from)."""
    options = _parse(argv)
    if options.logs is None:
        raise ValueError("logs: got None, with which nothing is saved and which is for Python only: pass a directory")
    check_directory("logs", options.logs)
    from ..train import TrainingInterrupted, train
    from ..train.ranks.distributed import ElsewhereRaised

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
    groups = parse(_Grouped, argv, "clipup train", config=(tyro.conf.OmitArgPrefixes,))
    FLAG_OF["cache"] = "--cache-data"
    values: dict[str, Any] = {"moe_cfg": groups.sparse_layers}
    for name, group in GROUPS.items():
        values |= {field.name: getattr(getattr(groups, name), field.name) for field in dataclasses.fields(group)}
    options = TrainOptions(**values)
    refuse_unknown_models(options)
    refuse_idle(argv, options, RULES)
    return options
