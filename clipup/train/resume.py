"""Resuming: which checkpoint is used, and which options may have changed since it was written.

A position is (epoch, steps of the current epoch). At an epoch's end it means the same for every batch size and number
of ranks. Within an epoch the steps stand for the samples seen only as long as the conditions are the same, because they
decide which samples are in which step; so changes of these conditions are refused there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data.options import is_csv
from . import checkpoints
from .distributed import Ranks
from .options import TrainOptions
from .run_directory import RunDirectory, load_together

IDENTITY = ("model", "moe", "moe_cfg", "train_data", "seed", "siglip")
"""Options that identify a run."""
ORDER = ("batch_size", "accum_freq", "seed", "dataset_type", "dataset_resampled", "train_num_samples", "cache_data")
"""Options that decide which samples are in which step."""
START = ("pretrained", "resume_dense")
"""Options that only set the weights before the first step."""
_OF_THE_CALL = ("name", "logs", "resume", "resume_with_changes", "force")


def find_checkpoint(
    options: TrainOptions, directory: RunDirectory | None, ranks: Ranks
) -> tuple[checkpoints.Newest | None, list[str]]:
    """The checkpoint to continue from, and notes on the choice for the log."""
    wanted = options.resume
    if wanted is None:
        return None, []
    if directory is None:
        return checkpoints.Newest(Path(wanted), load_together(Path(wanted), ranks), []), []
    found = directory.resumed_from(wanted, ranks)
    if found is not None:
        path, unusable = found.path, found.passed_over
        return found, [f"resumed from {path}, because a checkpoint cannot be used: {reason}" for reason in unusable]
    started = ranks.first_does(directory.holds_a_run)
    return None, [f"no checkpoint in {directory.checkpoints} yet: starts from the beginning"] if started else []


def conditions(options: TrainOptions, world_size: int, steps_of_epoch: int) -> dict[str, Any]:
    """What the meaning of a checkpoint's position depends on, as plain values.

    Args:
        steps_of_epoch: steps of a whole epoch.
    """
    return {"options": _values(options), "world_size": world_size, "steps_of_epoch": steps_of_epoch}


def changes(state: dict[str, Any], options: TrainOptions, world_size: int, source: Path) -> list[str]:
    """Notes for the log on options that have changed since a checkpoint was written.

    Args:
        state: the checkpoint. One without ``conditions``, such as open_clip_train's, is not compared.

    Raises:
        ValueError: an option that identifies the run has changed, without ``resume_with_changes``; or, within an epoch,
            anything that decides which samples are in which step.
    """
    if "conditions" not in state:
        return []
    was = {**state["conditions"]["options"], "world_size": state["conditions"]["world_size"]}
    now = {**_values(options), "world_size": world_size}
    changed = {key: f"{key} {was[key]!r} -> {now[key]!r}" for key in now if key in was and was[key] != now[key]}
    if _within_epoch(state):
        _refuse_within_epoch(state, [changed[key] for key in _order(options) if key in changed], source)
    identity = [text for key, text in changed.items() if key.partition(".")[0] in IDENTITY]
    if identity and not options.resume_with_changes:
        raise ValueError(
            f"{source} is of a run with other options: {', '.join(identity)}. Use the former values to continue it, "
            "another --name to start a separate run, or --resume-with-changes to continue it with these values"
        )
    without_effect = [changed.pop(key) for key in START if key in changed]
    notes = [f"resumed with changes, which take effect from now on: {', '.join(changed.values())}"] if changed else []
    if without_effect:
        notes.append(
            f"changes without effect, because the weights come from the checkpoint: {', '.join(without_effect)}"
        )
    return notes


def other_length(state: dict[str, Any], steps_of_epoch: int, source: Path) -> bool:
    """Whether the number of steps in an epoch has changed since the checkpoint was written.

    Raises:
        ValueError: it has changed, and the checkpoint is from within an epoch.
    """
    before = state["conditions"]["steps_of_epoch"] if "conditions" in state else steps_of_epoch
    if before == steps_of_epoch:
        return False
    if _within_epoch(state):
        cause = f"other training data ({steps_of_epoch} steps in an epoch in place of {before})"
        _refuse_within_epoch(state, [cause], source)
    return True


def _within_epoch(state: dict[str, Any]) -> bool:
    """Whether a checkpoint of ours is from within an epoch, and not from its last step or between two epochs."""
    return 0 < state["step_of_epoch"] < state["conditions"]["steps_of_epoch"]


def _refuse_within_epoch(state: dict[str, Any], causes: list[str], source: Path) -> None:
    if causes:
        raise ValueError(
            f"{source} is from within epoch {state['epoch'] + 1}, after step {state['step_of_epoch']} of "
            f"{state['conditions']['steps_of_epoch']}; with {', '.join(causes)} the rest of the epoch would repeat "
            "some samples and leave out others. Resume with the former values, or from the checkpoint of an epoch's "
            "end (--resume .../epoch_K.pt), where they may change"
        )


def _order(options: TrainOptions) -> tuple[str, ...]:
    """The options that decide the order of samples, for streamed shards also the workers, which read in turn."""
    from_csv = is_csv(options.train_data, options.dataset_type)
    streamed = options.train_data is not None and not from_csv and not options.cache_data
    return (*ORDER, "world_size", *(["workers"] if streamed else []))


def _values(options: TrainOptions) -> dict[str, Any]:
    """The options of the run as plain values by name, without those of a single call; the sparse layers' as
    ``moe_cfg.NAME``."""
    values = {key: value for key, value in json.loads(options.to_json()).items() if key not in _OF_THE_CALL}
    layers = values.pop("moe_cfg") or {}
    return values | {f"moe_cfg.{key}": value for key, value in layers.items()}
