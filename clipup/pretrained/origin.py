"""Where a model's weights come from: a file, a directory, the hub, or nowhere."""

from __future__ import annotations

from pathlib import Path

import open_clip

from . import model_card, model_names
from .hub import HUB_PREFIX

_SHOWN_TAGS = 3


def brings_weights(model_name: str, pretrained: str | None) -> bool:
    """Whether a model has other weights than random ones."""
    return bool(pretrained) or model_name.startswith(HUB_PREFIX) or model_names.directory_of(model_name) is not None


def refuse_random_weights(argument: str, model_name: str, pretrained: str | None, otherwise: str = "") -> None:
    """
    Args:
        argument: that names the weights, for the message. otherwise: what else can be done.

    Raises:
        ValueError: the model would have random weights, or is unknown.
    """
    if brings_weights(model_name, pretrained):
        return
    model_names.get_model_config(model_name)
    tags = open_clip.list_pretrained_tags_by_model(model_name)[:_SHOWN_TAGS]
    of_hub = f", or a tag such as {', '.join(tags)}" if tags else ""
    otherwise = f", {otherwise}" if otherwise else ""
    raise ValueError(
        f"{argument} is missing, so {model_name} would have random weights; give a file of weights{of_hub}{otherwise}"
    )


def base_model(model_name: str | None, pretrained: str | None) -> str | None:
    """ORG/NAME on the hub of the model that these weights come from, as a model card names it; None where that is not
    known.

    Args:
        model_name: a name, a directory or "hf-hub:ORG/NAME". pretrained: a tag, a file, or a directory.
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
    of_tag = open_clip.get_pretrained_cfg(model_name, pretrained).get("hf_hub", "") if pretrained else ""
    return "/".join(of_tag.split("/")[:2]) or None
