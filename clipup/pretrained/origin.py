"""The origin of a model's weights: a file, a tag, a directory, the hub, or random initialization."""

from __future__ import annotations

from pathlib import Path

import open_clip

from . import known_models, model_card, model_names
from .hub import HUB_PREFIX

_SHOWN_TAGS = 3


def refuse_random_weights(argument: str, model_name: str, pretrained: str | None, alternative: str = "") -> None:
    """
    Args:
        argument: the argument that specifies the weights, for the error message.
        alternative: what else the user can do, for the error message.

    Raises:
        ValueError: the model would have random weights, or is unknown.
    """
    if known_models.has_weights(model_name, pretrained):
        return
    model_names.get_model_config(model_name)
    tags = open_clip.list_pretrained_tags_by_model(model_name)[:_SHOWN_TAGS]
    hint = f", or a tag such as {', '.join(tags)}" if tags else ""
    alternative = f", {alternative}" if alternative else ""
    raise ValueError(
        f"{argument} is missing, so {model_name} would have random weights; pass a file of weights{hint}{alternative}"
    )


def base_model(model_name: str | None, pretrained: str | None) -> str | None:
    """The hub name ORG/NAME of the model that the weights come from, for a model card; None if unknown.

    Args:
        model_name: an open_clip model name, a directory or "hf-hub:ORG/NAME".
        pretrained: a tag, a file or a directory.
    """
    if pretrained is not None and Path(pretrained).is_dir():
        return model_card.base_model_in(pretrained)
    if model_name is None:
        return None
    if model_name.startswith(HUB_PREFIX):
        return model_name.removeprefix(HUB_PREFIX)
    directory = model_names.directory_of(model_name)
    if directory is not None:
        return model_card.base_model_in(directory)
    hub_path = open_clip.get_pretrained_cfg(model_name, pretrained).get("hf_hub", "") if pretrained else ""
    return "/".join(hub_path.split("/")[:2]) or None
