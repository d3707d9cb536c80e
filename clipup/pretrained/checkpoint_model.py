"""The model of a training checkpoint, as its run built it: the checkpoint's own configs, not those of a name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from open_clip.model import CLIPTextCfg
from torch import nn

from . import architecture, factory, model_directory, model_names, tokenizers
from .config_files import check_depth
from .model_directory import CONFIG_NAME
from .state_dicts import Weights
from .timm_size import resize_tower

_OF_TOKENIZER = (
    *(("hf_tokenizer_name", None), ("tokenizer_kwargs", None), ("tokenizer_mode", None)),
    ("vocab_size", CLIPTextCfg.vocab_size),
)
"""Fields of ``text_cfg``, with open_clip's defaults."""


class CheckpointModel(NamedTuple):
    """A model with its weights, on the CPU."""

    model: nn.Module
    preprocess: Any
    """The transform of validation images."""
    model_cfg: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    """By name; empty for a tokenizer that ``model_cfg`` names."""


def checkpoint_model(weights: Weights, path: Path, name: str | None = None) -> CheckpointModel:
    """
    Args:
        weights: of the checkpoint.
        path: of the checkpoint, for messages.
        name: of the model, for a checkpoint without its config, or without its tokenizer.

    Raises:
        ValueError: the checkpoint has no config and there is no name, or there are both and they differ; or the weights
            do not fit.
        FileNotFoundError: the tokenizer was in the directory of a model that is not there.
    """
    configs = {key: value for key, value in weights.configs.items() if value is not None}
    if name is not None:
        named = model_names.get_model_config(name)
        own = configs.setdefault("model_cfg", named)
        model_directory.check_model_cfg(own, path)
        if _differ(own, named, tokenizers.saved_in(weights.configs, path) is not None):
            raise ValueError(
                f"model: {path} holds the config of its model, which is not that of {name!r}; drop --model"
            )
    if "model_cfg" not in configs:
        raise ValueError(
            f"{path} does not say which model it is of; pass --model with the name or directory that the run was given"
        )
    model_directory.check_model_cfg(configs["model_cfg"], path)
    configs["model_cfg"] = architecture.with_logit_bias(configs["model_cfg"], weights.state_dict.get("logit_bias"))
    check_depth(configs["model_cfg"], len(weights.state_dict), path)
    files = _tokenizer_files(weights, path, configs["model_cfg"]["text_cfg"], name)
    configs.pop("tokenizer_files", None)
    with tempfile.TemporaryDirectory() as temporary:  # so that the config is checked like any that is read
        (Path(temporary) / CONFIG_NAME).write_text(json.dumps(configs), encoding="utf-8")
        with factory.expecting_random_weights():
            model, _, preprocess = factory.create_model_and_transforms(
                f"{model_names.LOCAL_PREFIX}{temporary}",
                load_weights=False,
                pretrained_image=False,
                pretrained_text=False,
            )
    resize_tower(model, configs["model_cfg"], weights.state_dict)
    factory.load_state_dict(model, weights.state_dict, str(path))
    return CheckpointModel(model, preprocess, configs["model_cfg"], files)


def _differ(own: dict[str, Any], named: dict[str, Any], has_tokenizer: bool) -> bool:
    """Whether the configs of a checkpoint and of a name are those of other models. If the name only stands for the
    tokenizer, which an earlier checkpoint lacks: whether those of other tokenizers."""
    ours, theirs = own["text_cfg"], named["text_cfg"]
    if has_tokenizer or not ours.get("hf_tokenizer_name"):
        return bool(architecture.differing(own, named))
    return any((ours.get(field) or default) != (theirs.get(field) or default) for field, default in _OF_TOKENIZER)


def _tokenizer_files(weights: Weights, path: Path, text_cfg: dict[str, Any], name: str | None) -> dict[str, bytes]:
    """Of the tokenizer that the run trained with; if they are not in the checkpoint, of the model with this name."""
    files = tokenizers.saved_in(weights.configs, path)
    if files is not None:
        return files
    if not text_cfg.get("hf_tokenizer_name"):
        return {}
    if name is None:
        raise ValueError(
            f"{path} does not hold its tokenizer; pass the model that the run began with as --model to clipup convert"
        )
    return tokenizers.files_of(text_cfg, tokenizers.source_directory(name))
