"""Resuming: which checkpoint is used, and which options may have changed since it was written.

A position is (epoch, steps of the current epoch). At an epoch's end it means the same for every batch size and number
of ranks. Within an epoch the steps stand for the samples seen only as long as the conditions are the same. Of indexed
data these are the data, the seed and the global batch: the product of batch size, batches per step and ranks. Other
data are read again, and all that decides which samples are in which step must be the same. Changes are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoints import open_clip_format, sharded
from .checkpoints.run_directory import RunDirectory
from .options import TrainOptions
from .ranks.distributed import Ranks

IDENTITY = (
    *("model", "pretrained", "moe", "moe_cfg", "train_data", "seed", "siglip"),
    *("force_image_size", "force_context_length", "force_quick_gelu", "force_custom_text", "opt"),
)
"""Options that identify a run. With ``pretrained`` come the normalization of images and the tokenizer."""
BATCH = ("batch_size", "accum_freq", "world_size")
"""Whose product is the global batch."""
DATA = ("dataset_type", "dataset_resampled", "train_data_upsampling_factors", "train_num_samples")
"""Options that decide which samples there are."""
SEQUENCE = ("seed", "cache_data")
"""Options that decide their order, or their augmentation."""
MEASURED = (
    *IDENTITY,
    *("val_data", "imagenet_val", "imagenet_v2", "multi_positive", "precision", "csv_separator", "csv_img_key"),
    *("csv_caption_key", "image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)
"""Options that decide what the numbers of an evaluation are of."""
START = ("resume_dense",)
"""Options that only set weights and moments before the first step."""
_OF_THE_CALL = ("name", "logs", "resume", "resume_with_changes", "force")


def find_checkpoint(
    options: TrainOptions, directory: RunDirectory | None, ranks: Ranks
) -> tuple[open_clip_format.Newest | None, Path | None, list[str]]:
    """The checkpoint to continue from; its path, if the run begins from it because it is of another run; and notes on
    the choice for the log. A collective."""
    if options.resume is None:
        return None, None, []
    path, notes = Path(options.resume), []
    if directory is not None and options.resume == "latest":
        path = ranks.first_does(directory.begun_from)
        if path is None:
            listed = ranks.first_does(lambda: open_clip_format.in_order(directory.checkpoints))
            newest = open_clip_format.newest(directory.checkpoints, lambda path: _load_together(path, ranks), listed)
            if newest is None:
                return None, None, [f"no checkpoint in {directory.checkpoints} yet: starts from the beginning"]
            return (
                newest,
                None,
                [
                    f"resumed from {newest.path}, because a checkpoint cannot be used: {why}"
                    for why in newest.passed_over
                ],
            )
        notes = [f"the run was begun from {path} and has no checkpoint of its own yet: begins from it again"]
    own = directory is None or ranks.first_does(lambda: directory.holds(path))
    return open_clip_format.Newest(path, _load_together(path, ranks)), None if own else path, notes


def _load_together(path: Path, ranks: Ranks) -> dict[str, Any]:
    """A checkpoint on all ranks, or the error of one on all. Of a sharded checkpoint each rank checks some of the
    files, and the state is without tensors."""
    state: dict[str, Any] = {}

    def load() -> None:
        if path.is_dir():
            index = sharded.check(path, ranks.rank, ranks.world_size)
            state.update(sharded.read_state(path) | index.configs)
        else:
            state.update(open_clip_format.load(path))

    ranks.each_does(load)
    return state


def conditions(
    options: TrainOptions, world_size: int, steps_of_epoch: int, order: dict[str, Any] | None
) -> dict[str, Any]:
    """What the meaning of a checkpoint's position depends on, as plain values.

    Args:
        steps_of_epoch: steps of a whole epoch.
        order: what the samples of a step depend on besides the seed, of indexed data (``TrainData.order``).
    """
    return {"options": _values(options), "world_size": world_size, "steps_of_epoch": steps_of_epoch, "order": order}


def changes(state: dict[str, Any], options: TrainOptions, world_size: int, source: Path) -> list[str]:
    """Notes for the log on options that have changed since a checkpoint was written.

    Args:
        state: the checkpoint. One without ``conditions``, such as open_clip_train's, is not compared.

    Raises:
        ValueError: an option that identifies the run has changed, without ``resume_with_changes``.
    """
    if "conditions" not in state:
        return []
    changed = _changed(state["conditions"], {"options": _values(options), "world_size": world_size})
    identity = [text for key, text in changed.items() if key.partition(".")[0] in IDENTITY]
    if identity and not options.resume_with_changes:
        raise ValueError(
            f"{source} is of a run with other options: {', '.join(identity)}. Use the former values to continue it, "
            "another --name without --resume to start a separate run, or --resume-with-changes to continue it with "
            "these values, if its weights fit"
        )
    changed = {key: text for key, text in changed.items() if key not in START}
    return [f"resumed with changes, which take effect from now on: {', '.join(changed.values())}"] if changed else []


def measures_differ(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether numbers of an evaluation under the former options are of something else."""
    names = {name for name in was | now if name.partition(".")[0] in MEASURED}
    return any(was.get(name) != now.get(name) for name in names)


def check_position(state: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """
    Args:
        state: a checkpoint.
        now: the conditions of this run.

    Raises:
        ValueError: the checkpoint is from within an epoch, and the rest of it would repeat some samples and leave out
            others.
    """
    was = state.get("conditions")
    if was is None or not 0 < state["step_of_epoch"] < was["steps_of_epoch"]:
        return
    keys: tuple[str, ...] = SEQUENCE
    if was["order"] is None or now["order"] is None:
        keys += (*BATCH, *DATA, *(("workers",) if now["options"]["train_data"] is not None else ()))
    changed = _changed(was, now)
    causes = [changed[key] for key in keys if key in changed]
    if not causes and any(was[key] != now[key] for key in ("order", "steps_of_epoch")):
        what = f"{was['steps_of_epoch']} steps of {was['order']} -> {now['steps_of_epoch']} of {now['order']}"
        causes = [changed[key] for key in (*BATCH, *DATA) if key in changed] or [f"other training data ({what})"]
    if causes:
        raise ValueError(
            f"{source} is from within epoch {state['epoch'] + 1}, after step {state['step_of_epoch']} of "
            f"{was['steps_of_epoch']}; with {', '.join(causes)} the rest of the epoch would repeat "
            "some samples and leave out others. Resume with the former values, or, with another --name, from the "
            "checkpoint of an epoch's end (--resume .../epoch_K.pt), where they may change"
        )


def _changed(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Changed options and ``world_size`` by name, as text."""
    before, after = ({**each["options"], "world_size": each["world_size"]} for each in (was, now))
    return {
        key: f"{key} {before[key]!r} -> {after[key]!r}" for key in after if key in before and before[key] != after[key]
    }


def _values(options: TrainOptions) -> dict[str, Any]:
    """The options of the run as plain values by name, without those of a single call; the sparse layers' as
    ``moe_cfg.NAME``."""
    values = {key: value for key, value in json.loads(options.to_json()).items() if key not in _OF_THE_CALL}
    layers = values.pop("moe_cfg") or {}
    return values | {f"moe_cfg.{key}": value for key, value in layers.items()}
