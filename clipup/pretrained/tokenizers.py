"""``get_tokenizer``: the tokenizer of a model, by model name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip

from .. import checks
from ..clip import word_tokenizer
from . import hub, model_directory
from .model_names import LOCAL_PREFIX, directory_of, get_model_config, hub_access

_OPTIONS = frozenset(
    (
        *("clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens", "use_fast", "legacy"),
        *("do_lower_case", "model_max_length", "padding_side", "truncation_side", "add_prefix_space", "add_bos_token"),
        *("add_eos_token", "src_lang", "tgt_lang", "clean_up_tokenization_spaces", "split_special_tokens"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    )
)
"""``tokenizer_kwargs`` that a config may set: those of open_clip's tokenizers, and of transformers' those that name no
file, repository or code."""
_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
"""Of transformers' tokenizers; the first is in every directory with one."""


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


def files_of(text_cfg: dict[str, Any], directory: Path | None) -> dict[str, bytes]:
    """The tokenizer's files of a model with this config, by name: a word vocabulary, or those of a Hugging Face
    tokenizer that lies in the model's directory.

    Raises:
        FileNotFoundError, ValueError: the vocabulary was not found, or is not valid.
    """
    if word_tokenizer.uses_words(text_cfg):
        text = word_tokenizer.vocabulary_text(text_cfg["hf_tokenizer_name"], directory)
        return {word_tokenizer.FILE_NAME: text.encode("utf-8")}
    if not text_cfg.get("hf_tokenizer_name") or directory is None or not (directory / _FILES[0]).is_file():
        return {}
    return {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}


def _tokenizer(model_name: str, **kwargs: Any) -> Any:
    directory = directory_of(model_name)
    if model_name.startswith(hub.HUB_PREFIX):
        return _hub_tokenizer(model_name, **kwargs)
    text_cfg = get_model_config(model_name).get("text_cfg", {})
    if directory is not None:
        _check_options(text_cfg, model_name)
    if word_tokenizer.uses_words(text_cfg):
        return word_tokenizer.from_config(text_cfg, directory, **kwargs)
    if directory is None:
        return open_clip.get_tokenizer(model_name, **kwargs)
    hub_name = text_cfg.get("hf_tokenizer_name")
    if hub_name and not (directory / "tokenizer_config.json").is_file():
        _check_tokenizer_name(hub_name, model_name)
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
    _check_options(text_cfg, model_name)
    if word_tokenizer.uses_words(text_cfg):
        found = hub.cached(model_name, model_directory.CONFIG_NAME, word_tokenizer.FILE_NAME, cache_dir=cache_dir)
        return word_tokenizer.from_config(text_cfg, found, **kwargs)
    _check_tokenizer_name(text_cfg.get("hf_tokenizer_name"), model_name)
    return open_clip.get_tokenizer(model_name, cache_dir=cache_dir, **kwargs)


def _check_tokenizer_name(name: Any, source: str) -> None:
    model_directory.check_name(f"hf_tokenizer_name in the config of {source}", name)


def _check_options(text_cfg: dict[str, Any], source: str) -> None:
    """Refuses ``tokenizer_kwargs`` that could name files elsewhere, or have transformers run code from the model."""
    options = text_cfg.get("tokenizer_kwargs") or {}
    checks.check(f"tokenizer_kwargs in the config of {source}", options, isinstance(options, dict), "an object")
    refused = sorted(set(options) - _OPTIONS)
    if refused:
        raise ValueError(
            f"tokenizer_kwargs: the config of {source} sets {', '.join(refused)}, but may set only what names no other "
            f"files and no code ({', '.join(sorted(_OPTIONS))}). Remove it from the config, save the tokenizer in the "
            "model's directory or, if you trust it, load the tokenizer with transformers"
        )
