"""Sharded checkpoints on disk: a directory in which each rank wrote a part of the tensors.

    DIR/*.safetensors          the parts, as torch.distributed.checkpoint (DCP) writes them: a file a rank
    DIR/index.json             sizes and checksums of these files, which DCP does not check, and the configs of the
                               model; written last
    DIR/state.pt               the position of the run (``clipup.train.checkpoints.sharded``)

The tensors are "model.NAME" and "optimizer.NAME.KEY". Nothing in these files is executed when they are read: they are
JSON, safetensors, and a pickle of plain values and tensors (``state_dicts.read_pickle``).
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INDEX = "index.json"
MODEL = "model."
"""How the names of weights and buffers begin."""
OPTIMIZER = "optimizer."
"""How the names of the optimizer's tensors begin."""

_CHUNK_BYTES = 1 << 24

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)  # DCP's


class FileSum(NamedTuple):
    """What a file must be."""

    size: int
    crc32: int


class Index(NamedTuple):
    """What a sharded checkpoint must hold, and the configs of its model."""

    files: dict[str, FileSum]
    configs: dict[str, Any]
    """``model_cfg``, ``moe_cfg``, ``preprocess_cfg`` and ``tokenizer_files``, None where the run has none."""

    def to_json(self) -> str:
        content = {"files": self.files, "configs": self.configs}
        return json.dumps({"crc32": _crc_of(content), "content": content}) + "\n"


def is_sharded(path: str | Path) -> bool:
    """Whether this is the directory of a sharded checkpoint."""
    return (Path(path) / INDEX).is_file()


def read_index(directory: Path) -> Index:
    """
    Raises:
        ValueError: the index is missing or damaged, or the files are not those that it lists.
        OSError: it could not be read.
    """
    path = directory / INDEX
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        if file["crc32"] != _crc_of(file["content"]):
            raise ValueError("its checksum is another")
        listed, configs = file["content"]["files"], file["content"]["configs"]
    except FileNotFoundError as error:
        raise ValueError(f"{directory} is not a whole sharded checkpoint: {INDEX} is missing") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    files = {name: FileSum(*sums) for name, sums in listed.items()}
    for name in sorted({part.name for part in directory.glob("*.safetensors")} ^ files.keys()):
        raise ValueError(f"{directory} is not a whole sharded checkpoint: {name} is missing, or is of another one")
    return Index(files, configs)


def _crc_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of a file that is read inside name it: those of opening do, those of reading do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sum_of(path: Path) -> FileSum:
    crc = size = 0
    with reading(path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return FileSum(size, crc)


def check_files(directory: Path, index: Index, names: Iterable[str]) -> None:
    """Compares files with their sizes and checksums.

    Raises:
        ValueError: a file is damaged.
        OSError: one could not be read.
    """
    for name in names:
        actual, expected = sum_of(directory / name), index.files[name]
        if actual != expected:
            raise ValueError(
                f"{directory / name} is damaged: its size and checksum are {tuple(actual)} instead of {tuple(expected)}"
            )


def described(directory: Path) -> dict[str, Any]:
    """DCP's ``TensorStorageMetadata`` of the tensors by name: ``size`` and ``properties.dtype`` are those of the whole
    tensor."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # takes seconds to import

    return dict(HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata)


def read_tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin like this, whole, on the CPU and without that beginning."""
    from torch.distributed import checkpoint as dcp

    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in described(directory).items()
        if name.startswith(prefix)
    }
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
