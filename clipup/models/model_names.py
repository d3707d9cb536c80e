"""Resolves the names of models (open_clip's, directories, repositories on the hub), and where weights come from."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import open_clip

from ..clip import word_tokenizer
from ..extras import needed_for
from . import hub, known_models, model_card, model_directory
from .known_models import LOCAL_PREFIX as LOCAL_PREFIX

open_clip.add_model_config(known_models.CONFIGS)  # clipup's models, by name


def get_model_config(model_name: str) -> dict[str, Any]:
    """A copy of the ``model_cfg`` of a model: its architecture, as in open_clip's JSON files.

    Args:
        model_name: a name that open_clip knows, or the directory of a model.

    Raises:
        ValueError: it is neither, or the directory holds no valid config.
    """
    directory = directory_of(model_name)
    if directory is not None:
        return model_directory.read_config(directory)["model_cfg"]
    check_known(model_name, None)
    return open_clip.get_model_config(model_name)


def directory_of(model_name: str) -> Path | None:
    """The directory that a model name refers to, for that of a finished run the run's model; None for open_clip and hub
    names."""
    directory = Path(model_name.removeprefix(LOCAL_PREFIX))
    named = model_name in open_clip.list_models() or model_name.startswith(hub.HUB_PREFIX)
    if not model_name.startswith(LOCAL_PREFIX) and (named or not directory.is_dir()):
        return None
    places = (directory, directory / "model")
    return next((place for place in places if (place / model_directory.CONFIG_NAME).is_file()), directory)


def own_directory_on_hub(model_name: str, load_weights: bool, cache_dir: str | None) -> Path | None:
    """The local directory of a sparse or int8 model on the hub; None for other models, which open_clip loads."""
    if not model_name.startswith(hub.HUB_PREFIX):
        return None
    directory = hub.cached(model_name, model_directory.CONFIG_NAME, cache_dir=cache_dir)
    config = model_directory.read_config(directory)
    if config.get("moe_cfg") is None and model_directory.INT8 not in config:
        return None
    files = model_directory.CONFIG_NAME, *[model_directory.WEIGHTS_NAME] * load_weights
    return hub.cached(model_name, *files, cache_dir=cache_dir)


@contextmanager
def hub_access(model_name: str, pretrained: str | None, text_field: str, cache_dir: str | None) -> Iterator[None]:
    """Wraps code that may download parts of a model; handles a missing network and missing packages.

    Args:
        text_field: the field of ``text_cfg`` that names the tokenizer or model on the Hugging Face hub.
    """
    on_hub = model_name.startswith(hub.HUB_PREFIX)
    text_cfg = {} if on_hub else get_model_config(model_name)["text_cfg"]
    hf_name = None if word_tokenizer.uses_words(text_cfg) else text_cfg.get(text_field)
    if hf_name:
        with needed_for(f"the text tower of {model_name}", "hf"):
            import transformers  # noqa: F401
    tag = open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained else {}
    if not (on_hub or tag or hf_name):
        yield
        return
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    on_page = f"{file or 'open_clip_model.safetensors'} of https://huggingface.co/{repository}"
    place = on_page if repository else tag.get("url", "")
    what = f"{model_name} with the weights {pretrained!r} ({place})" if tag else model_name
    with (
        hub.refusing_code(what) if on_hub or hf_name else nullcontext(),  # open_clip's own models are trusted
        hub.naming_what_is_missing(what, cache_dir),
    ):
        yield


def check_known(model_name: str, pretrained: str | None, argument: str = "pretrained") -> None:
    """Raises ``ValueError`` for an unknown model name, for weights that are neither a file nor a known tag, and for
    weights beside those that a directory has. ``argument``: what the message calls the weights."""
    on_hub = model_name.startswith(hub.HUB_PREFIX)
    if pretrained and (on_hub or directory_of(model_name) is not None):
        raise ValueError(
            f"{argument}={pretrained!r} cannot be used with the directory or repository {model_name}: it has its own "
            "weights"
        )
    if on_hub:
        return
    names = open_clip.list_models()
    if model_name not in names and not model_name.startswith(LOCAL_PREFIX) and not Path(model_name).is_dir():
        lower = {name.lower(): name for name in names}
        close = [lower[name] for name in difflib.get_close_matches(model_name.lower(), lower, n=3)]
        hint = f"; similar names are {', '.join(close)}" if close else ""
        if Path(model_name).is_file():
            hint = "; to load a file of weights, pass it as pretrained, with the name of its model"
        raise ValueError(f"{model_name!r} is neither an open_clip model nor a directory{hint}")
    if pretrained and open_clip.get_pretrained_cfg(model_name, pretrained) == {} and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise ValueError(f"{argument}={pretrained!r} is neither a file nor a tag of {model_name}; its tags are {tags}")


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
    get_model_config(model_name)
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    hint = f", or one of its tags: {', '.join(tags)}" if tags else ""
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
    if model_name.startswith(hub.HUB_PREFIX):
        return model_name.removeprefix(hub.HUB_PREFIX)
    directory = directory_of(model_name)
    if directory is not None:
        return model_card.base_model_in(directory)
    hub_path = open_clip.get_pretrained_cfg(model_name, pretrained).get("hf_hub", "") if pretrained else ""
    return "/".join(hub_path.split("/")[:2]) or None
