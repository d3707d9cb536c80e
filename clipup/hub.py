"""Files of models on the Hugging Face hub, by way of its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from open_clip.pretrained import download_pretrained_from_hf

HUB_PREFIX = "hf-hub:"


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
