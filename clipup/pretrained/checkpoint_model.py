"""The model of a training checkpoint, as its run built it: the checkpoint's own configs, not those of a name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from . import factory, model_names
from .config_files import check_depth
from .model_directory import CONFIG_NAME
from .state_dicts import Weights


class CheckpointModel(NamedTuple):
    """A model with its weights, on the CPU."""

    model: nn.Module
    preprocess: Any
    """The transform of validation images."""
    model_cfg: dict[str, Any]


def checkpoint_model(weights: Weights, path: Path, name: str | None = None) -> CheckpointModel:
    """
    Args:
        weights: of the checkpoint.
        path: of the checkpoint, for messages.
        name: of the model, for a checkpoint without its config.

    Raises:
        ValueError: the checkpoint has no config and there is no name, or there are both and they differ; or the weights
            do not fit.
    """
    configs = {key: value for key, value in weights.configs.items() if value is not None}
    if name is not None:
        named = model_names.get_model_config(name)
        if configs.setdefault("model_cfg", named) != named:
            raise ValueError(
                f"model: {path} holds the config of its model, which is not that of {name!r}; drop --model"
            )
    if "model_cfg" not in configs:
        raise ValueError(
            f"{path} does not say which model it is of; pass --model with the name or directory that the run was given"
        )
    check_depth(configs["model_cfg"], len(weights.state_dict), path)
    with tempfile.TemporaryDirectory() as temporary:  # so that the config is checked like any that is read
        (Path(temporary) / CONFIG_NAME).write_text(json.dumps(configs), encoding="utf-8")
        with factory.expecting_random_weights():
            model, _, preprocess = factory.create_model_and_transforms(
                f"{model_names.LOCAL_PREFIX}{temporary}", load_weights=False
            )
    factory.load_state_dict(model, weights.state_dict, str(path))
    return CheckpointModel(model, preprocess, configs["model_cfg"])
