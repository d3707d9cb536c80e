"""``get_tokenizer``: the tokenizer of a model, by model name."""

from __future__ import annotations

import base64
import json
import tempfile
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
_RECORDED = "special_tokens_map_file"
"""A path that transformers writes into a tokenizer's config, and does not read from there."""
CONFIG_FILE = "config.json"
"""Of a model of transformers, which says what kind of tokenizer its directory has."""
_KIND = ("model_type", "tokenizer_class")
ALL_FILES = (word_tokenizer.FILE_NAME, *_FILES, CONFIG_FILE)
"""Of all tokenizers."""


def get_tokenizer(model_name: str, **kwargs: Any) -> Any:
    """open_clip's function of the same name, which also accepts a directory and supports word tokenizers.

    A Hugging Face tokenizer is read from the directory if it was saved there, otherwise by the name in the config. The
    same holds for the vocabulary of a word tokenizer (``clipup.clip.word_tokenizer``).
    """
    with hub_access(model_name, None, "hf_tokenizer_name", kwargs.get("cache_dir")):
        try:
            return _tokenizer(model_name, **kwargs)
        except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"the tokenizer of {model_name} could not be created: {str(error) or repr(error)}"
            ) from error


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
    if not text_cfg.get("hf_tokenizer_name") or directory is None or not (directory / _FILES[0]).is_file():
        return {}
    files = {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}
    kind = _kind(directory)
    return files if kind is None else {**files, CONFIG_FILE: kind}


def without_kind(files: dict[str, bytes], directory: Path) -> dict[str, bytes]:
    """The files to save in a directory: without ``config.json`` if the directory has one, which may be another
    library's and is left as it is.

    Raises:
        ValueError: transformers would make another tokenizer of the files beside that ``config.json``.
    """
    if _FILES[0] not in files or not (directory / CONFIG_FILE).is_file():
        return files
    if _kind(directory) != files.get(CONFIG_FILE):
        raise ValueError(
            f"directory: {directory} holds a {CONFIG_FILE} of another model, by which transformers would choose "
            f"another kind of tokenizer than the model's; choose another directory, or remove {CONFIG_FILE} from it"
        )
    return {name: content for name, content in files.items() if name != CONFIG_FILE}


def _kind(directory: Path) -> bytes | None:
    """Of a directory's ``config.json``, as one of its own, by what transformers chooses a tokenizer's class; None if
    nothing."""
    path = directory / CONFIG_FILE
    config = checks.read_json(path) if path.is_file() else None
    found = {name: config[name] for name in _KIND if isinstance(config, dict) and isinstance(config.get(name), str)}
    return json.dumps(found).encode("utf-8") if found else None


def saved_in(configs: dict[str, Any], path: Path | str) -> dict[str, bytes] | None:
    """The tokenizer's files that a training checkpoint brings, by name; none for a tokenizer that its config names, and
    None if the checkpoint does not say.

    Args:
        configs: ``Weights.configs``.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: they are not what ``for_checkpoint`` gave.
    """
    encoded = configs.get("tokenizer_files")
    if encoded is None:
        return None
    try:
        files = {name: base64.b64decode(text, validate=True) for name, text in encoded.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its tokenizer_files are not files in base64 ({error})") from error
    unknown = [name for name in files if name not in ALL_FILES]
    if unknown:
        raise ValueError(f"{path}: tokenizer_files has {checks.shown(unknown[0])}, which is no file of a tokenizer")
    return files


def for_checkpoint(files: dict[str, bytes]) -> dict[str, str]:
    """The tokenizer's files for a checkpoint, as text that JSON can represent."""
    return {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}


def from_files(model_cfg: dict[str, Any], files: dict[str, bytes]) -> Any:
    """The tokenizer of a model's config and its files, as ``get_tokenizer`` gives it for a directory with both."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        config = json.dumps({"model_cfg": model_cfg})
        (directory / model_directory.CONFIG_NAME).write_text(config, encoding="utf-8")
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return get_tokenizer(f"{LOCAL_PREFIX}{directory}")


def _tokenizer(model_name: str, cache_dir: str | None = None, **kwargs: Any) -> Any:
    if model_name.startswith(hub.HUB_PREFIX):
        directory = _snapshot(model_name, cache_dir)
        text_cfg = {} if directory is None else model_directory.read_config(directory)["model_cfg"]["text_cfg"]
    else:
        directory = directory_of(model_name)
        text_cfg = get_model_config(model_name).get("text_cfg", {})
    if directory is not None:
        _check_options(text_cfg, model_name)
    if word_tokenizer.uses_words(text_cfg):
        return _word_tokenizer(text_cfg, directory, **kwargs)
    if directory is None:  # a name, or a tokenizer alone on the hub
        return open_clip.get_tokenizer(model_name, cache_dir=cache_dir, **kwargs)
    options = {**(text_cfg.get("tokenizer_kwargs") or {}), **kwargs}
    options.setdefault("context_length", text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
    hub_name = text_cfg.get("hf_tokenizer_name")
    if not hub_name:
        return open_clip.tokenizer.SimpleTokenizer(**options)
    own = (directory / _FILES[0]).is_file()
    if own:
        _check_own(directory)
    else:
        _check_tokenizer_name(hub_name, model_name)
    return open_clip.tokenizer.HFTokenizer(
        str(directory) if own else hub_name,
        cache_dir=cache_dir,
        tokenizer_mode=text_cfg.get("tokenizer_mode"),
        **options,
    )


def _word_tokenizer(
    text_cfg: dict[str, Any], directory: Path | None, context_length: int | None = None, **unknown: Any
) -> Any:
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: no option of a word tokenizer, which has context_length only")
    return word_tokenizer.from_config(text_cfg, directory, context_length)


def _snapshot(model_name: str, cache_dir: str | None) -> Path | None:
    """The cached directory of a model on the hub with those of its tokenizer's files that it has; None if it is not an
    open_clip model."""
    try:
        directory = hub.cached(model_name, model_directory.CONFIG_NAME, cache_dir=cache_dir)
    except FileNotFoundError:  # a tokenizer alone, or an error from open_clip
        return None
    text_cfg = model_directory.read_config(directory)["model_cfg"]["text_cfg"]
    wanted = file_names(text_cfg)
    if wanted and hub.add_if_there(directory, model_name, wanted[0], cache_dir):
        for file in (*wanted[1:], *[CONFIG_FILE] * (wanted == _FILES)):
            hub.add_if_there(directory, model_name, file, cache_dir)
    return directory


def _check_tokenizer_name(name: Any, source: str) -> None:
    model_directory.check_name(f"hf_tokenizer_name in the config of {source}", name)


def _check_own(directory: Path) -> None:
    """Refuses a tokenizer's config that names files outside of its directory, which transformers would read. Paths that
    lead nowhere, as of the machine where a tokenizer was saved, are ignored. A file of the directory may itself be a
    link, as in the hub's cache."""
    path = directory / _FILES[0]
    config = checks.read_json(path)
    checks.check(str(path), config, isinstance(config, dict), "an object")
    inside = directory.resolve()
    for key, value in config.items():
        if key == _RECORDED or (key not in ("vocab", "merges") and not key.endswith(("_file", "_files"))):
            continue
        for name in value if isinstance(value, list) else [value]:
            found = [Path(name), directory / name] if isinstance(name, str) and "\0" not in name else []
            if any(file.is_file() and inside not in (file.parent.resolve() / file.name).parents for file in found):
                raise ValueError(
                    f"{path}: {key} is {checks.shown(name)}, a file outside of the model's directory, which a config "
                    "must not refer to. Copy the file into the directory, or remove the key"
                )


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
