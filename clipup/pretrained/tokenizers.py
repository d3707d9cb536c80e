"""Tokenizers by the name of a model."""

from __future__ import annotations

from typing import Any

import open_clip

from ..clip import word_tokenizer
from . import hub, model_directory
from .model_names import LOCAL_PREFIX, directory_of, get_model_config, reaching_hub


def get_tokenizer(model_name: str, **kwargs: Any) -> Any:
    """open_clip's function of the same name, which also takes a bare directory.

    A Hugging Face tokenizer is read from the directory where it was saved there, else by the name in the config; the
    vocabulary of a ``clipup.clip.word_tokenizer`` likewise.
    """
    with reaching_hub(model_name, None, "hf_tokenizer_name", kwargs.get("cache_dir")):
        return _tokenizer(model_name, **kwargs)


def _tokenizer(model_name: str, **kwargs: Any) -> Any:
    directory = directory_of(model_name)
    if model_name.startswith(hub.HUB_PREFIX):
        return _hub_tokenizer(model_name, **kwargs)
    text_cfg = get_model_config(model_name).get("text_cfg", {})
    _refuse_code(text_cfg, model_name)
    if word_tokenizer.is_asked_for(text_cfg):
        return word_tokenizer.of_config(text_cfg, directory, **kwargs)
    if directory is None:
        return open_clip.get_tokenizer(model_name, **kwargs)
    hub_name = text_cfg.get("hf_tokenizer_name")
    if hub_name and not (directory / "tokenizer_config.json").is_file():
        options = {**text_cfg.get("tokenizer_kwargs", {}), **kwargs}
        options.setdefault("context_length", text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
        return open_clip.tokenizer.HFTokenizer(hub_name, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    return open_clip.get_tokenizer(f"{LOCAL_PREFIX}{directory}", **kwargs)


def _hub_tokenizer(model_name: str, cache_dir: str | None = None, **kwargs: Any) -> Any:
    try:
        found = hub.cached(model_name, model_directory.CONFIG_NAME, cache_dir=cache_dir)
        text_cfg = model_directory.read_config(found)["model_cfg"].get("text_cfg", {})
    except FileNotFoundError:  # no model of open_clip's: a tokenizer by itself, or nothing, as open_clip will say
        text_cfg = {}
    _refuse_code(text_cfg, model_name)
    if word_tokenizer.is_asked_for(text_cfg):
        found = hub.cached(model_name, model_directory.CONFIG_NAME, word_tokenizer.FILE_NAME, cache_dir=cache_dir)
        return word_tokenizer.of_config(text_cfg, found, **kwargs)
    return open_clip.get_tokenizer(model_name, cache_dir=cache_dir, **kwargs)


def _refuse_code(text_cfg: dict[str, Any], source: str) -> None:
    """A config's ``tokenizer_kwargs`` reach transformers, which runs a model's own code when they say so."""
    if (text_cfg.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise ValueError(
            f"tokenizer_kwargs: the config of {source} sets trust_remote_code, which would run code that comes with "
            "it; nothing of it was run. Remove that from the config, or load the tokenizer with transformers, if you "
            "trust it"
        )
