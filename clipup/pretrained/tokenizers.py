"""``get_tokenizer``: the tokenizer of a model, by model name."""

from __future__ import annotations

import re
from typing import Any

import open_clip

from .. import checks
from ..clip import word_tokenizer
from . import hub, model_directory
from .model_names import LOCAL_PREFIX, directory_of, get_model_config, hub_access

_FILE_OPTION = re.compile(r".*_(file|files|path|dir)")


def get_tokenizer(model_name: str, **kwargs: Any) -> Any:
    """open_clip's function of the same name, which also accepts a directory and supports word tokenizers.

    A Hugging Face tokenizer is read from the directory if it was saved there, otherwise by the name in the config. The
    same holds for the vocabulary of a word tokenizer (``clipup.clip.word_tokenizer``).
    """
    with hub_access(model_name, None, "hf_tokenizer_name", kwargs.get("cache_dir")):
        try:
            return _tokenizer(model_name, **kwargs)
        except (AssertionError, ArithmeticError, AttributeError, LookupError) as error:
            raise ValueError(f"the tokenizer of {model_name} could not be created: {error}") from error


def _tokenizer(model_name: str, **kwargs: Any) -> Any:
    directory = directory_of(model_name)
    if model_name.startswith(hub.HUB_PREFIX):
        return _hub_tokenizer(model_name, **kwargs)
    text_cfg = get_model_config(model_name).get("text_cfg", {})
    _refuse_code_and_files(text_cfg, model_name)
    if word_tokenizer.uses_words(text_cfg):
        return word_tokenizer.from_config(text_cfg, directory, **kwargs)
    if directory is None:
        return open_clip.get_tokenizer(model_name, **kwargs)
    hub_name = text_cfg.get("hf_tokenizer_name")
    if hub_name and not (directory / "tokenizer_config.json").is_file():
        model_directory.check_name(f"hf_tokenizer_name in the config of {model_name}", hub_name)
        options = {**text_cfg.get("tokenizer_kwargs", {}), **kwargs}
        options.setdefault("context_length", text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
        return open_clip.tokenizer.HFTokenizer(hub_name, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    return open_clip.get_tokenizer(f"{LOCAL_PREFIX}{directory}", **kwargs)


def _hub_tokenizer(model_name: str, cache_dir: str | None = None, **kwargs: Any) -> Any:
    try:
        found = hub.cached(model_name, model_directory.CONFIG_NAME, cache_dir=cache_dir)
        text_cfg = model_directory.read_config(found)["model_cfg"].get("text_cfg", {})
    except FileNotFoundError:  # not an open_clip model: a tokenizer alone, or an error from open_clip
        text_cfg = {}
    _refuse_code_and_files(text_cfg, model_name)
    if word_tokenizer.uses_words(text_cfg):
        found = hub.cached(model_name, model_directory.CONFIG_NAME, word_tokenizer.FILE_NAME, cache_dir=cache_dir)
        return word_tokenizer.from_config(text_cfg, found, **kwargs)
    return open_clip.get_tokenizer(model_name, cache_dir=cache_dir, **kwargs)


def _refuse_code_and_files(text_cfg: dict[str, Any], source: str) -> None:
    """Refuses ``tokenizer_kwargs`` that name files, or set ``trust_remote_code``: transformers would run code from the
    model."""
    options = text_cfg.get("tokenizer_kwargs") or {}
    checks.check(f"tokenizer_kwargs in the config of {source}", options, isinstance(options, dict), "an object")
    for option in options:
        if _FILE_OPTION.fullmatch(option):
            raise ValueError(
                f"tokenizer_kwargs: the config of {source} sets {option}, but must not refer to other files; save the "
                "tokenizer in the model's directory instead"
            )
    if options.get("trust_remote_code"):
        raise ValueError(
            f"tokenizer_kwargs: the config of {source} sets trust_remote_code, which would run code from the model; "
            "nothing was run. Remove it from the config or, if you trust the code, load the tokenizer with transformers"
        )
