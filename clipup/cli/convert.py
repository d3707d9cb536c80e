"""``clipup convert``: makes a model directory of a training checkpoint."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from .. import atomic_files
from ..locks import LOCK_FILE, exclusive
from ..pretrained import factory, model_names, saving
from ..pretrained.config_files import check_depth
from ..pretrained.model_directory import CONFIG_NAME
from ..pretrained.shard_files import is_sharded, read_index
from ..pretrained.state_dicts import check_archive, read_pickle, read_weights
from ..train.finite import not_finite
from .flags import parse
from .outputs import check_directory


@dataclass
class Options:
    """Makes a model directory (a config, weights as safetensors, a card) of a checkpoint of clipup train, sharded or in
    one file. Nothing in the checkpoint is executed. clipup eval, inspect and upcycle, and
    clipup.create_model_and_transforms read the directory.

    Example: clipup convert logs/b16-moe/checkpoints/epoch_3 models/b16-moe
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A directory epoch_K or step_N of a sharded checkpoint, or a file epoch_K.pt, also of open_clip's trainer."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the model. It must be empty or not exist."""
    model: str | None = None
    """The model that was trained, as its run named it, for a checkpoint without its config."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup convert")
    path = Path(options.checkpoint)
    if path.is_dir() and not is_sharded(path):
        raise ValueError(
            f"checkpoint: {path} is not the directory of a sharded checkpoint; expected epoch_K or step_N in the "
            "checkpoints/ of a run, or a file epoch_K.pt there"
        )
    if options.out.exists() and not options.out.is_dir():
        raise FileExistsError(f"{options.out} is a file; choose another directory")
    check_directory("out", options.out)
    with exclusive(options.out / LOCK_FILE, options.out, "wait for it to end, or choose another directory"):
        atomic_files.remove_abandoned(options.out, locked=True)
        if {file.name for file in options.out.iterdir()} - {LOCK_FILE}:
            raise FileExistsError(f"{options.out} is not empty; choose another directory")
        model, model_cfg = load(path, options.model)
        saving.save_pretrained(model, options.out, model_cfg)
    print(f"saved to {options.out}")
    return 0


def load(path: Path, name: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, and its architecture config.

    Args:
        name: of the model, for a checkpoint without its config.

    Raises:
        ValueError: the checkpoint is damaged, has no config, does not fit it, or holds values that are not finite.
        FileNotFoundError: there is no such file.
    """
    weights = read_weights(path)
    configs = read_index(path).configs if is_sharded(path) else _configs_of_file(path)
    if name is not None:
        configs["model_cfg"] = model_names.get_model_config(name)
    if configs["model_cfg"] is None:
        raise ValueError(
            f"{path} does not say which model it is of; pass --model with the name or directory that the run was given"
        )
    broken = not_finite(weights.state_dict)
    if broken is not None:
        raise ValueError(f"{path} holds values that are not finite, in {broken}; convert an earlier checkpoint")
    config = {key: value for key, value in configs.items() if value is not None}
    check_depth(config.get("model_cfg"), len(weights.state_dict), path)
    with tempfile.TemporaryDirectory() as temporary:  # so that the config is checked like any that is read
        (Path(temporary) / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        with factory.expecting_random_weights():
            model, *_ = factory.create_model_and_transforms(
                f"{model_names.LOCAL_PREFIX}{temporary}", load_weights=False
            )
    factory.load_state_dict(model, weights.state_dict, str(path))
    return model, configs["model_cfg"]


def _configs_of_file(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if path.suffix != ".safetensors":
        check_archive(path, suffix="data.pkl")
        content = read_pickle(path, mmap=True)
    return {key: content.get(key) for key in ("model_cfg", "moe_cfg", "preprocess_cfg")}
