"""``get_tokenizer``: the tokenizer of a model, by model name."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import open_clip

from ..clip import word_tokenizer
from . import hub, model_directory
from .model_names import directory_of, get_model_config, hub_access

_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "config.json"),
)
"""Files of transformers' tokenizers. Every directory with a tokenizer has the first. From the last, the model's config,
transformers chooses the tokenizer's class if no other file names it."""


def get_tokenizer(model_name: str, **kwargs: Any) -> Any:
    """open_clip's function of the same name, which also accepts a directory and supports word tokenizers.

    A Hugging Face tokenizer is read from the directory if it was saved there, otherwise by the name in the config. The
    same holds for the vocabulary of a word tokenizer (``clipup.clip.word_tokenizer``). No code that comes with a
    tokenizer is executed.

    Raises:
        ValueError: the tokenizer needs such code, or the vocabulary does not have the model's size.
    """
    cache_dir = kwargs.pop("cache_dir", None)
    with hub_access(model_name, None, "hf_tokenizer_name", cache_dir):
        if model_name.startswith(hub.HUB_PREFIX):
            directory = _snapshot(model_name, cache_dir)
            text_cfg = {} if directory is None else model_directory.read_config(directory)["model_cfg"]["text_cfg"]
        else:
            directory = directory_of(model_name)
            text_cfg = get_model_config(model_name)["text_cfg"]
        if word_tokenizer.uses_words(text_cfg):
            vocabulary = word_tokenizer.vocabulary_text(text_cfg["hf_tokenizer_name"], directory)
            return word_tokenizer.from_text(vocabulary, text_cfg, **kwargs)
        if directory is None:  # a name, or a tokenizer alone on the hub
            return open_clip.get_tokenizer(model_name, cache_dir=cache_dir, **kwargs)
        options = {**(text_cfg.get("tokenizer_kwargs") or {}), **kwargs}
        if options.get("trust_remote_code"):
            raise ValueError(f"tokenizer_kwargs in the config of {model_name} has trust_remote_code; no code was run")
        length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        options = {"context_length": length, **options}
        hub_name = text_cfg.get("hf_tokenizer_name")
        if not hub_name:
            return open_clip.tokenizer.SimpleTokenizer(**options)
        return open_clip.tokenizer.HFTokenizer(
            str(directory) if (directory / _FILES[0]).is_file() else hub_name,
            cache_dir=cache_dir,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            **options,
        )


def source_directory(model_name: str, cache_dir: str | None = None) -> Path | None:
    """The directory in which a model's own tokenizer would be: that of the model, of a model on the hub its snapshot in
    the cache, to which the tokenizer's files are downloaded. None for open_clip names."""
    if not model_name.startswith(hub.HUB_PREFIX):
        return directory_of(model_name)
    with hub_access(model_name, None, "hf_tokenizer_name", cache_dir):
        return _snapshot(model_name, cache_dir)


def file_names(text_cfg: dict[str, Any]) -> tuple[str, ...]:
    """The files of a directory from which a tokenizer with this config may be read; the first is always among them.
    Without ``hf_tokenizer_name`` none is, whatever lies there: open_clip's own tokenizer needs no files."""
    if word_tokenizer.uses_words(text_cfg):
        return (word_tokenizer.FILE_NAME,)
    return _FILES if text_cfg.get("hf_tokenizer_name") else ()


def files_of(text_cfg: dict[str, Any], directory: Path | None) -> dict[str, bytes]:
    """The tokenizer's files of a model with this config, by name: a word vocabulary, or those of a Hugging Face
    tokenizer that lies in the model's directory.

    Raises:
        FileNotFoundError, ValueError: the vocabulary was not found, is not valid, or has another size than the model's.
    """
    if word_tokenizer.uses_words(text_cfg):
        text = word_tokenizer.vocabulary_text(text_cfg["hf_tokenizer_name"], directory)
        word_tokenizer.from_text(text, text_cfg)
        return {word_tokenizer.FILE_NAME: text.encode("utf-8")}
    names = file_names(text_cfg)
    if not names or directory is None or not (directory / names[0]).is_file():
        return {}
    return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}


def saved_in(configs: dict[str, Any], path: Path | str) -> dict[str, bytes] | None:
    """The tokenizer's files in a training checkpoint, by name: none for a tokenizer that its config names; None if the
    checkpoint says nothing about its tokenizer.

    Args:
        configs: ``Weights.configs``.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: a file has a name that is not a tokenizer's, so it could be written elsewhere.
    """
    encoded = configs.get("tokenizer_files")
    if encoded is None:
        return None
    if unknown := set(encoded) - {word_tokenizer.FILE_NAME, *_FILES}:
        raise ValueError(f"{path}: tokenizer_files names {', '.join(unknown)}; expected files of a tokenizer")
    return {name: base64.b64decode(text) for name, text in encoded.items()}


def check_same(files: dict[str, bytes] | None, configs: dict[str, Any], path: Path | str) -> None:
    """
    Args:
        files: of the model's tokenizer by name, if they are known.
        configs, path: as ``saved_in`` takes them.

    Raises:
        ValueError: the checkpoint was trained with another tokenizer.
    """
    trained = saved_in(configs, path)
    if trained is not None and files is not None and trained != files:
        raise ValueError(f"{path} was trained with another tokenizer than that of the model; restore its files")


def for_checkpoint(files: dict[str, bytes]) -> dict[str, str]:
    """The tokenizer's files for a checkpoint, as text that JSON can represent."""
    return {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}


def _snapshot(model_name: str, cache_dir: str | None) -> Path | None:
    """The cached directory of a model on the hub with those of its tokenizer's files that it has; None if it is not an
    open_clip model."""
    directory = hub.cached(model_name, model_directory.CONFIG_NAME, cache_dir=cache_dir)
    if not (directory / model_directory.CONFIG_NAME).is_file():  # a tokenizer alone
        return None
    names = file_names(model_directory.read_config(directory)["model_cfg"]["text_cfg"])
    return hub.cached(model_name, model_directory.CONFIG_NAME, *names, cache_dir=cache_dir)
