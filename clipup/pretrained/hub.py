"""Files of models on the Hugging Face hub, by way of its cache on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from open_clip.pretrained import download_pretrained_from_hf

HUB_PREFIX = "hf-hub:"
_SECONDS_TO_ANSWER = 5


def cached(name: str, *files: str, cache_dir: str | None = None) -> Path:
    """The directory in the cache that holds these files of a model, all of one commit; downloads what is not there.

    Args:
        name: "hf-hub:ORG/NAME".

    Raises:
        FileNotFoundError: the hub has no such model or file, or cannot be reached and the cache has none.
    """
    directory, commit = None, None
    for file in files:
        path = download_pretrained_from_hf(
            name.removeprefix(HUB_PREFIX), filename=file, revision=commit, cache_dir=cache_dir
        )
        directory = Path(path).parent
        commit = directory.name
    return directory


@contextmanager
def cache_alone_if_unreachable(what: str, cache_dir: str | None = None) -> Iterator[None]:
    """Inside, huggingface_hub reads its cache alone when the hub does not answer, and fails at once where that does not
    do. By itself it retries every file for half a minute.

    Args:
        what: is loaded, for the message.

    Raises:
        FileNotFoundError: the hub does not answer, and the cache lacks a file.
    """
    reason = _why_unreachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = reason is not None
    try:
        with without_log_lines("Failed to download weights"):  # the error says so
            yield
    except Exception as error:
        if reason is None or not _is_cache_miss(error):
            raise
        raise FileNotFoundError(
            f"{what} is not in the cache {cache_dir or constants.HF_HUB_CACHE} and cannot be downloaded: {reason}. "
            "Download it where there is a network and give the file (pretrained) or the directory, or copy the cache. "
            f"Missing: {str(error).partition('. ')[0]}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def without_log_lines(start: str) -> Iterator[None]:
    """Silences records of the root logger, to which open_clip writes, that begin with these words."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logging.getLogger().addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(keep)


def _why_unreachable() -> str | None:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_ANSWER)
    except Exception as error:  # of httpx or of requests, by the version of huggingface_hub
        return f"{constants.ENDPOINT} does not answer ({error})"
    return None


def _is_cache_miss(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False
