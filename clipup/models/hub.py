"""Downloads files of models from the Hugging Face hub, through its local cache."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from .known_models import HUB_PREFIX as HUB_PREFIX

_LOGGERS = (None, "open_clip.factory", "open_clip.pretrained")
"""Where open_clip logs: version 3 to the root logger, version 4 by module."""
_RANDOM_WEIGHTS = ("No pretrained weights loaded", "Local config loaded, but no CLIP weights found")
"""How open_clip's warnings about random weights start."""


def cached(name: str, *files: str, cache_dir: str | None = None) -> Path:
    """The cache directory of a model, with those of ``files`` that the model has, all of one commit. Missing files are
    downloaded; without the hub, only earlier downloads are there.

    Args:
        name: "hf-hub:ORG/NAME".

    Raises:
        OSError: the hub has no such model, or nothing of it is cached and the hub is unreachable.
    """
    return Path(snapshot_download(name.removeprefix(HUB_PREFIX), cache_dir=cache_dir, allow_patterns=list(files)))


def is_cached(repository: str) -> bool:
    """Whether weights of an open_clip model's repository, ORG/NAME, are in the cache."""
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # open_clip takes the first that is there
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


@contextmanager
def naming_what_is_missing(what: str, cache_dir: str | None = None) -> Iterator[None]:
    """Inside, a file that is neither cached nor can be downloaded raises an error that says what to do.

    Args:
        what: what is being loaded, for the error message.

    Raises:
        FileNotFoundError: a file is not cached, and the hub does not respond or ``HF_HUB_OFFLINE`` is set.
    """
    try:
        with suppress_log_lines("Failed to download weights"):  # the error below says more
            yield
    except Exception as error:
        if not _is_cache_miss(error):
            raise
        raise FileNotFoundError(
            f"{what} is not in the cache {cache_dir or constants.HF_HUB_CACHE} and cannot be downloaded: the hub does "
            "not respond, or HF_HUB_OFFLINE is set. Download it on a machine with network access and pass the file "
            "(pretrained) or the directory, or copy the cache"
        ) from error


@contextmanager
def refusing_code(what: str) -> Iterator[None]:
    """Inside, transformers refuses what needs code from its own directory or repository, instead of asking on the
    terminal whether to run it.

    Args:
        what: what is being loaded, for the error message.

    Raises:
        ValueError: it needs such code; none was run.
    """
    if importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers import dynamic_module_utils

    timeout = dynamic_module_utils.TIME_OUT_REMOTE_CODE  # seconds to wait for an answer; 0: does not ask
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error) or "tokenizer_kwargs" in str(error):
            raise
        raise ValueError(
            f"{what} needs code that comes with it, and clipup does not run that; nothing was run. If you trust the "
            "code, load it with transformers"
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = timeout


@contextmanager
def suppress_log_lines(start: str | tuple[str, ...]) -> Iterator[None]:
    """Suppresses records of open_clip that start with ``start``, or with one of them."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def expecting_random_weights() -> AbstractContextManager[None]:
    """Suppresses open_clip's warning about random weights where they are intended."""
    return suppress_log_lines(_RANDOM_WEIGHTS)


def _is_cache_miss(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False
