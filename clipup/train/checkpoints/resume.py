"""Resuming: which checkpoint is used, and which options may have changed since it was written.

A position is (epoch, steps of the current epoch). At an epoch's end it means the same for every batch size and number
of ranks. Within an epoch the steps stand for the samples seen only as long as the conditions are the same. Of indexed
data these are the data, the seed and the global batch: the product of batch size, batches per step and ranks. Other
data are read again, and all that decides which samples are in which step must be the same. Changes are refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ...option_group import Resumed
from ..parallel.ranks import Ranks
from . import kept
from .directory import RunDirectory
from .format import format_of
from .options import RunDirectoryOptions
from .position import RunState


class Conditions(NamedTuple):
    """Options and facts that give a checkpoint's position its meaning."""

    options: dict[str, Any]
    """The run's options by name, as JSON values."""
    rules: dict[str, Resumed]
    """What a change of each option means."""
    world_size: int
    steps_of_epoch: int = 0
    order: dict[str, Any] | None = None
    """What the samples of a step depend on besides the seed, of indexed data (``TrainData.order``)."""

    def rule(self, name: str) -> Resumed:
        """What a change of ``world_size``, of an option, or of a part of an option (OPTION.FIELD) means."""
        return Resumed.BATCH if name == "world_size" else self.rules.get(name.partition(".")[0], Resumed.FREE)

    def state_dict(self) -> dict[str, Any]:
        """In a checkpoint: options of a call are left out, and those of sparse layers are flat, as moe_cfg.NAME."""
        options = {name: value for name, value in self.options.items() if self.rule(name) != Resumed.CALL}
        layers = options.pop("moe_cfg") or {}
        options |= {f"moe_cfg.{name}": value for name, value in layers.items()}
        rest = {"world_size": self.world_size, "steps_of_epoch": self.steps_of_epoch, "order": self.order}
        return {"options": options, **rest}

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        factors = (value for name, value in self.options.items() if self.rule(name) == Resumed.BATCH)
        return math.prod(factors) * self.world_size

    def changed(self, was: dict[str, Any]) -> dict[str, str]:
        """What differs from the options and ``world_size`` of a checkpoint, by name, as text."""
        now = self.state_dict()
        before, after = ({**each["options"], "world_size": each["world_size"]} for each in (was, now))
        return {
            name: f"{name} {before[name]!r} -> {value!r}"
            for name, value in after.items()
            if name in before and before[name] != value
        }


class ResumePoint(NamedTuple):
    """The checkpoint that a run continues from."""

    path: Path
    state: dict[str, Any]
    other_run: Path | None
    """Path of the checkpoint if another run wrote it and this run begins from it."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the run that wrote the checkpoint, by name; empty for open_clip_train's."""
        return self.state.get("conditions", {}).get("options", {})


def find_checkpoint(
    options: RunDirectoryOptions, directory: RunDirectory | None, ranks: Ranks
) -> tuple[ResumePoint | None, list[str]]:
    """The checkpoint to continue from, and notes on the choice for the log. A collective."""
    if options.resume is None:
        return None, []
    path, notes = Path(options.resume), []
    if directory is not None and options.resume == "latest":
        path = ranks.on_first(directory.start)
        if path is None:
            listed = ranks.on_first(lambda: kept.in_order(directory.checkpoints))
            newest = kept.newest(directory.checkpoints, lambda path: _load_together(path, ranks), listed)
            if newest is None:
                return None, [f"no checkpoint in {directory.checkpoints} yet: starts from the beginning"]
            why = "because a checkpoint cannot be used"
            notes = [f"resumed from {newest.path}, {why}: {reason}" for reason in newest.passed_over]
            return ResumePoint(newest.path, newest.state, None), notes
        notes = [f"the run was begun from {path} and has no checkpoint of its own yet: begins from it again"]
    own = directory is None or ranks.on_first(lambda: directory.holds(path))
    return ResumePoint(path, _load_together(path, ranks), None if own else path), notes


def _load_together(path: Path, ranks: Ranks) -> dict[str, Any]:
    """Loads a checkpoint on all ranks. An error on any rank is raised on all of them."""
    state: dict[str, Any] = {}
    ranks.on_every(lambda: state.update(format_of(path).read_share(path, ranks.rank, ranks.world_size)))
    return state


def changes(checkpoint: ResumePoint, now: Conditions, accepted: bool) -> list[str]:
    """Notes for the log on options that have changed since a checkpoint was written. One of open_clip_train is not
    compared.

    Args:
        accepted: whether the options may identify another run (``resume_with_changes``).

    Raises:
        ValueError: an option that identifies the run has changed, and that is not accepted.
    """
    if "conditions" not in checkpoint.state:
        return []
    changed = now.changed(checkpoint.state["conditions"])
    identity = [text for name, text in changed.items() if Resumed.IDENTITY in now.rule(name)]
    if identity and not accepted:
        raise ValueError(
            f"{checkpoint.path} is of a run with other options: {', '.join(identity)}. Use the former values to "
            "continue it, another --name without --resume to start a separate run, or --resume-with-changes to "
            "continue it with these values, if its weights fit"
        )
    texts = [text for name, text in changed.items() if now.rule(name) != Resumed.START]
    return [f"resumed with changed options: {', '.join(texts)}"] if texts else []


def data_changes(checkpoint: ResumePoint, now: Conditions) -> list[str]:
    """A note for the log on indexed training data that have changed, where no option of how they are read has."""
    was = checkpoint.state.get("conditions", now.state_dict())
    former, order = was["order"] or {}, now.order or {}
    if (
        not (former and order)
        or former["data"] == order["data"]
        or any(now.rule(name) & (Resumed.SAMPLES | Resumed.ORDER) for name in now.changed(was))
    ):
        return []
    return [
        f"train_data: the data are not those of {checkpoint.path} ({former['rows']} -> {order['rows']} samples); the "
        "run goes on with the data as they are now"
    ]


def restore_position(state: RunState, checkpoint: dict[str, Any], now: Conditions, source: Path) -> None:
    """Takes the position from a checkpoint, ours or open_clip_train's.

    Raises:
        ValueError: the checkpoint is from within an epoch, and the rest of it would have other samples.
    """
    _check_position(checkpoint, now, source)
    steps = checkpoint["epoch"] * now.steps_of_epoch
    state.load_state_dict({"step": steps, "samples_seen": steps * now.global_batch} | checkpoint)
    current = now.state_dict()
    former = checkpoint.get("conditions", current)
    was, options = former["options"], current["options"]
    of_numbers = Resumed.IDENTITY | Resumed.MEASURED
    if any(was.get(name) != options.get(name) and now.rule(name) & of_numbers for name in was | options):
        state.validated = {}
    if former["steps_of_epoch"] != now.steps_of_epoch:
        state.step_of_epoch = now.steps_of_epoch if state.step_of_epoch else 0  # all of an epoch, or nothing
        state.steps_before = state.step - state.step_of_epoch - state.epoch * now.steps_of_epoch


def _check_position(checkpoint: dict[str, Any], now: Conditions, source: Path) -> None:
    """
    Raises:
        ValueError: the checkpoint is from within an epoch, and the rest of it would repeat some samples and leave out
            others.
    """
    was = checkpoint.get("conditions")
    if was is None or not 0 < checkpoint["step_of_epoch"] < was["steps_of_epoch"]:
        return
    perhaps = Resumed.BATCH | Resumed.SAMPLES
    refused = Resumed.ORDER
    if was["order"] is None or now.order is None:
        refused |= perhaps
        if now.options["train_data"] is not None:
            refused |= Resumed.STREAM
    changed = now.changed(was)
    causes = [text for name, text in changed.items() if now.rule(name) & refused]
    if not causes and (was["order"], was["steps_of_epoch"]) != (now.order, now.steps_of_epoch):
        what = f"{was['steps_of_epoch']} steps of {was['order']} -> {now.steps_of_epoch} of {now.order}"
        causes = [text for name, text in changed.items() if now.rule(name) & perhaps]
        causes = causes or [f"other training data ({what})"]
    if causes:
        raise ValueError(
            f"{source} is from within epoch {checkpoint['epoch'] + 1}, after step {checkpoint['step_of_epoch']} of "
            f"{was['steps_of_epoch']}; with {', '.join(causes)} the rest of the epoch would repeat "
            "some samples and leave out others. Resume with the former values, or, with another --name, from the "
            "checkpoint of an epoch's end (--resume .../epoch_K.pt), where they may change"
        )
