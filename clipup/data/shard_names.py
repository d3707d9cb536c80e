"""Shard names: expansion of patterns, and names listed in `dataset.json`.

What the user types may contain wildcards, braces, "::" and URLs. A name in a data set's `dataset.json` may only be that
of a file beside it, because a data set may come from anyone.
"""

from __future__ import annotations

import glob
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from .. import checks
from ..extras import needed_for
from .samples import PackedTexts, digest_of
from .shard_writer import DATASET_FILE, SIZES_FILE

_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):")
_PIPE = "pipe"
_FILE = "file"


def expand_shards(source: str | os.PathLike, argument: str, allow_pipe: bool | None = None) -> list[str]:
    """The shards of a source: a path, a pattern with braces or wildcards, a URL, or several of these joined by "::".

    Args:
        argument: what messages call the source.
        allow_pipe: whether `pipe:COMMAND` may run its command; None: the command lacks that option.

    Raises FileNotFoundError when a shard is missing, or all are, and ValueError for a `pipe:` that is not allowed.
    """
    source = os.fspath(source)
    shards: list[str] = []
    for pattern in [source] if os.path.isfile(source) else filter(None, source.split("::")):
        for name in [pattern] if os.path.isfile(pattern) else _braces(pattern):
            if is_remote(name) and not os.path.isfile(name):
                shards.append(_checked_url(name, argument, allow_pipe))
            else:
                shards += local_shards([name] if os.path.isfile(name) else sorted(glob.glob(name)) or [name], argument)
    if not shards:
        raise FileNotFoundError(f"{argument}: {source!r} names no shard, expected a path such as DIR/train-*.tar")
    return shards


def shard_weights(source: str | os.PathLike, factors: str, allow_pipe: bool | None = None) -> list[float]:
    """The factor of each of the training shards that ``expand_shards`` returns for a source of several.

    Args:
        factors: one number per source, such as "1::2" for "A::B".

    Raises ValueError when there is another number of factors, or one is not a positive number.
    """
    sources = list(filter(None, os.fspath(source).split("::")))
    with suppress(ValueError):
        numbers = list(map(float, factors.split("::")))
        if len(numbers) == len(sources) and all(0 < number < math.inf for number in numbers):
            expanded = [expand_shards(each, "train_data", allow_pipe) for each in sources]
            return [number for number, shards in zip(numbers, expanded, strict=True) for _ in shards]
    raise ValueError(
        f"train_data_upsampling_factors: got {factors!r} for the {len(sources)} sources in train_data, expected a "
        'positive number for each, separated by "::"'
    )


def listed_shards(directory: str | os.PathLike, split: str, argument: str) -> list[str]:
    """The shards of a split, as listed in the `dataset.json` of a data set's directory.

    Raises as `expand_shards`, and ValueError for a split that does not exist or a name that is not a bare file name.
    """
    splits = describe(directory).get("splits", {})
    if split not in splits:
        raise ValueError(f"split: {directory} has no split {split!r}, its splits are {', '.join(splits)}")
    names = [shard["file"] for shard in splits[split]["shards"]]
    for name in names:
        if name != os.path.basename(name) or name in ("", os.curdir, os.pardir):
            raise ValueError(
                f"{Path(directory) / DATASET_FILE} lists {name!r} as a shard, expected the name of a file beside it: "
                "do not trust it"
            )
    return local_shards([Path(directory) / name for name in names], argument)


def describe(directory: str | os.PathLike) -> dict:
    """The content of a data set's `dataset.json`: splits and their counts, rules, sources and licences."""
    path = Path(directory) / DATASET_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} contains no {DATASET_FILE}: build a data set there with `clipup data pictograms {directory}`"
        )
    return checks.read_json(path)


def local_shards(paths: Iterable[str | os.PathLike], argument: str) -> list[str]:
    """Files by their exact names, prefixed where they could be taken for a URL. Raises as `expand_shards`."""
    shards = []
    for path in (os.fspath(path) for path in paths):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{argument}: there is no shard {path}: build the data first, or correct the path")
        shards.append(os.path.join(os.curdir, path) if is_remote(path) else path)
    return shards


def is_remote(name: str) -> bool:
    """Whether a shard is given by a URL (http:, s3:, pipe:, file:, ...) instead of a path."""
    return _URL.match(name) is not None


def check_local(shards: Sequence[str], argument: str) -> None:
    """Raises ValueError for a shard that is given by a URL."""
    for shard in shards:
        if is_remote(shard):
            raise ValueError(f"{argument}: {shard} is not a local file, which is required here: copy it first")


def not_a_source(argument: str, directory: str | os.PathLike, shards: str = "*.tar") -> ValueError:
    """The error for a directory where shards or a CSV file are expected: what to name in it, or how to make data of it.

    Args:
        argument: the argument that got the directory.
        shards: a pattern of shards.
    """
    root = Path(directory)
    found = next((pattern for pattern in (shards, "*.tar") if any(root.glob(pattern))), None)
    if found is not None:
        return ValueError(f"{argument}: {root} is a directory: name shards, such as {root / found}")
    return ValueError(
        f"{argument}: {root} is a directory: name shards, or a CSV file with the columns filepath and title, separated "
        "by a tab, one image per line. Images with captions beside them (KEY.jpg, KEY.txt) become shards: "
        f"clipup data pairs {shlex.quote(str(root))} OUT"
    )


def open_shard(shard: str) -> BinaryIO:
    """Opens a shard returned by `expand_shards` for reading from its start."""
    if not is_remote(shard):
        return open(shard, "rb")
    from webdataset.gopen import Pipe, gopen

    file = gopen(_readable_without_token(shard))
    if isinstance(file, Pipe):
        file.args = shard  # its errors show the command, which holds the user's token for hf:
    return file


def _readable_without_token(shard: str) -> str:
    """The https: URL of an hf: shard for users without a token: webdataset would send "None", which the hub refuses."""
    if not shard.startswith("hf:"):
        return shard
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    if get_token():
        return shard
    path = HfFileSystem().resolve_path(shard)
    return hf_hub_url(path.repo_id, path.path_in_repo, repo_type=path.repo_type, revision=path.revision)


def names_digest(shards: Sequence[str]) -> str:
    """A digest of the names of shards, wherever they lie: of a URL the last part of its path counts, of a command
    nothing."""
    urls = [urlsplit(shard.strip()) for shard in shards]
    names = PackedTexts("" if url.scheme == _PIPE else os.path.basename(url.path) for url in urls)
    return digest_of(names.content, names.ends)


def sizes_of(shards: Sequence[str]) -> dict[str, int]:
    """The number of samples of each shard that a `sizes.json` beside it lists."""
    read = cache(_sizes_in)
    local = [shard for shard in shards if not is_remote(shard)]
    sizes = {shard: read(os.path.dirname(shard)).get(os.path.basename(shard)) for shard in local}
    return {shard: size for shard, size in sizes.items() if size is not None}


def _sizes_in(directory: str) -> dict[str, int]:
    path = Path(directory) / SIZES_FILE
    listed = checks.read_json(path) if path.is_file() else {}
    try:
        return {name: int(size) for name, size in listed.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected a number of samples for each shard ({error})") from error


def _braces(pattern: str) -> Iterator[str]:
    """A generator, because braces can stand for more names than fit into memory."""
    if "{" not in pattern:
        yield pattern
        return
    with needed_for("a shard name with braces", "train"):
        from braceexpand import braceexpand

    yield from braceexpand(pattern)


def _checked_url(url: str, argument: str, allow_pipe: bool | None) -> str:
    scheme = url.partition(":")[0].strip().lower()
    if scheme == _FILE or scheme == _PIPE and allow_pipe:
        return url
    if scheme == _PIPE:
        permitted = "which is not allowed here" if allow_pipe is None else "pass --allow-pipe if you trust it"
        fault = f"would run a command in a shell, {permitted}"
    elif "'" in url:  # webdataset passes URLs in single quotes to a shell
        fault = "contains a quote ('), which is not valid in a URL: write %27"
    else:
        with needed_for("reading shards by URL", "train"):
            from webdataset.gopen import gopen_schemes
        if scheme in gopen_schemes:
            return url
        known = ", ".join(sorted({*gopen_schemes, _FILE} - {"__default__"}))
        fault = f"has the unknown scheme {scheme}:, expected a path, or one of {known}"
    raise ValueError(f"{argument}: {url!r} {fault}")
