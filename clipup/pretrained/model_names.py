"""What a model's name means: open_clip's own, a directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip

from ..clip import word_tokenizer
from ..extras import needed_for
from . import hub, model_directory

LOCAL_PREFIX = "local-dir:"


def get_model_config(model_name: str) -> dict[str, Any]:
    """The ``model_cfg`` of a name that open_clip knows, or of a directory; a copy."""
    directory = directory_of(model_name)
    if directory is not None:
        return model_directory.read_config(directory)["model_cfg"]
    check_known(model_name, None)
    return open_clip.get_model_config(model_name)


def directory_of(model_name: str) -> Path | None:
    """The directory that a model name means, None when it is a name for open_clip."""
    if not isinstance(model_name, str):
        raise TypeError(f"model_name must be a str, also where it is a directory, got {type(model_name).__name__}")
    if model_name.startswith(LOCAL_PREFIX):
        return Path(model_name.removeprefix(LOCAL_PREFIX))
    if model_name in open_clip.list_models() or model_name.startswith(hub.HUB_PREFIX):
        return None
    return Path(model_name) if Path(model_name).is_dir() else None


@contextmanager
def reaching_hub(model_name: str, pretrained: str | None, text_field: str, cache_dir: str | None) -> Iterator[None]:
    """Around whatever may download parts of a model.

    Args:
        text_field: of the text tower's config, which names what Hugging Face has of it.
    """
    directory = directory_of(model_name)
    on_hub = model_name.startswith(hub.HUB_PREFIX)
    config = None if on_hub or directory is not None else open_clip.get_model_config(model_name)
    if directory is not None:
        config = model_directory.read_config(directory)["model_cfg"]
    text_cfg = (config or {}).get("text_cfg", {})
    hf_name = None if word_tokenizer.is_asked_for(text_cfg) else text_cfg.get(text_field)
    if hf_name:
        with needed_for(f"the text tower of {model_name}", "hf"):
            import transformers  # noqa: F401
    is_tag = pretrained is not None and open_clip.get_pretrained_cfg(model_name, pretrained) != {}
    if not (on_hub or is_tag or hf_name):
        yield
        return
    what = f"pretrained={pretrained!r} of {model_name}" if is_tag else model_name
    with hub.cache_alone_if_unreachable(what, cache_dir):
        yield


def check_known(model_name: str, pretrained: str | None) -> None:
    if model_name.startswith(hub.HUB_PREFIX):
        return
    if model_name.replace("/", "-") not in open_clip.list_models():
        close = difflib.get_close_matches(model_name, open_clip.list_models(), n=3)
        hint = f"; similar names are {', '.join(close)}" if close else ""
        raise ValueError(f"{model_name!r} is neither a model that open_clip knows nor a directory{hint}")
    if pretrained and open_clip.get_pretrained_cfg(model_name, pretrained) == {} and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise ValueError(f"pretrained={pretrained!r} is neither a file nor a tag of {model_name}; its tags are {tags}")
