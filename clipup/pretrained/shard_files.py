"""Sharded checkpoints on disk: a directory in which each rank wrote a part of the tensors.

    DIR/index.json             types and shapes of the tensors, and where their parts are; sizes and checksums of the
                               files; the configs of the model
    DIR/rank_R.safetensors     the parts that rank R wrote
    DIR/state.pt               the position of the run (``clipup.train.sharded_checkpoints``)

The tensors are "model.NAME" and "optimizer.NAME.KEY". Nothing in these files is executed when they are read: they are
JSON, safetensors, and a pickle of plain values and tensors (``state_dicts.read_pickle``).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

INDEX = "index.json"
MODEL = "model."
"""How the names of weights and buffers begin."""
OPTIMIZER = "optimizer."
"""How the names of the optimizer's tensors begin."""

_FORMAT = "clipup sharded checkpoint, version 1"
_FILE = re.compile(r"rank_\d+\.safetensors")
_CHUNK_BYTES = 1 << 24
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As safetensors names them."""
_NAME_OF_TYPE = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and the file that holds it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Entry:
    """A tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class FileSum:
    """What a file must be."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """What a sharded checkpoint holds."""

    tensors: dict[str, Entry]
    files: dict[str, FileSum]
    configs: dict[str, Any]
    """``model_cfg``, ``moe_cfg``, ``preprocess_cfg`` and ``tokenizer_files``, None where the run has none."""

    def to_json(self) -> str:
        tensors = {
            name: {
                "dtype": type_name(entry.dtype),
                "shape": entry.shape,
                "parts": [[part.offsets, part.shape, part.file] for part in entry.parts],
            }
            for name, entry in self.tensors.items()
        }
        files = {name: asdict(file) for name, file in self.files.items()}
        content = {"format": _FORMAT, "configs": self.configs, "files": files, "tensors": tensors}
        return json.dumps({"crc32": _crc_of(content), "content": content}) + "\n"


def type_name(dtype: torch.dtype) -> str:
    """safetensors' name of a type. Raises ``TypeError`` for one that a sharded checkpoint cannot hold."""
    if dtype not in _NAME_OF_TYPE:
        raise TypeError(f"a sharded checkpoint cannot hold {dtype}; use fsdp_checkpoint='full'")
    return _NAME_OF_TYPE[dtype]


def is_sharded(path: str | Path) -> bool:
    """Whether this is the directory of a sharded checkpoint."""
    return (Path(path) / INDEX).is_file()


def read_index(directory: Path) -> Index:
    """
    Raises:
        ValueError: the index is missing or damaged, or describes what cannot be in the files.
        OSError: it could not be read.
    """
    path = directory / INDEX
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        content = file["content"]
        if file["crc32"] != _crc_of(content):
            raise ValueError("its checksum is another")
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version of clipup reads {_FORMAT!r}")
        files = {
            _file_name(name): FileSum(*_sizes((sums["size"], sums["crc32"]))) for name, sums in content["files"].items()
        }
        tensors = {name: _entry(entry) for name, entry in content["tensors"].items()}
        _check_sizes(tensors, files)
        return Index(tensors, files, dict(content["configs"]))
    except FileNotFoundError as error:
        raise ValueError(f"{directory} is not a whole sharded checkpoint: {INDEX} is missing") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _entry(entry: dict[str, Any]) -> Entry:
    shape = _sizes(entry["shape"])
    parts = tuple(Part(_sizes(offsets), _sizes(size), _file_name(file)) for offsets, size, file in entry["parts"])
    for part in parts:
        inside = (at + size <= whole for at, size, whole in zip(part.offsets, part.shape, shape, strict=True))
        if not all(inside):
            raise ValueError(f"a part {part} is not inside of the shape {shape}")
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise ValueError(f"parts do not make up the shape {shape}")
    if shape and _some_overlap(parts):
        raise ValueError(f"two parts of the shape {shape} overlap")
    return Entry(_TYPES[entry["dtype"]], shape, parts)


def _some_overlap(parts: Sequence[Part]) -> bool:
    """Whether an element is in two of the boxes. Only boxes that meet along the first axis are compared."""
    ordered = sorted((part for part in parts if math.prod(part.shape)), key=lambda part: part.offsets)
    for index, one in enumerate(ordered):
        end = one.offsets[0] + one.shape[0]
        for other in ordered[index + 1 :]:
            if other.offsets[0] >= end:
                break
            if _overlap(one, other):
                return True
    return False


def _overlap(one: Part, other: Part) -> bool:
    boxes = zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    return all(max(at, with_at) < min(at + size, with_at + with_size) for at, size, with_at, with_size in boxes)


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are not sizes")
    return tuple(values)


def _file_name(name: Any) -> str:
    """Only names as ranks write them: nothing that leads out of the directory."""
    if not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a file of a sharded checkpoint")
    return str(name)


def _check_sizes(tensors: Mapping[str, Entry], files: Mapping[str, FileSum]) -> None:
    """Refuses tensors that need more bytes than their files have, before memory is allocated for them."""
    needed = dict.fromkeys(files, 0)
    for entry in tensors.values():
        for part in entry.parts:
            needed[part.file] += math.prod(part.shape) * entry.dtype.itemsize
    for name, count in needed.items():
        if count > files[name].size:
            raise ValueError(f"tensors of {count} bytes cannot be in {name}, which has {files[name].size}")


def _crc_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def check_files(directory: Path, index: Index, names: Iterable[str]) -> None:
    """Compares files with their sizes and checksums.

    Raises:
        ValueError: one is missing or damaged.
        OSError: one could not be read.
    """
    for name in names:
        path, expected, crc, size = directory / name, index.files[name], 0, 0
        try:
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        if size != expected.size:
            raise ValueError(f"{path} is damaged: it has {size} bytes in place of {expected.size}")
        if crc != expected.crc32:
            raise ValueError(f"{path} is damaged: its checksum is another")


def write_parts(
    path: Path, parts: Mapping[str, tuple[torch.dtype, Sequence[int]]], data: Callable[[str], Tensor]
) -> FileSum:
    """Writes a safetensors file, one tensor after the other, so that no second copy of all is in memory.

    Args:
        parts: type and shape by name, as ``part_name`` makes it.
        data: the tensor on the CPU by that name.
    """
    names = sorted(parts, key=lambda name: -parts[name][0].itemsize)  # so that all are aligned
    header, end = {}, 0
    for name in names:
        dtype, shape = parts[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": type_name(dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = crc = 0
    with open(path, "wb") as file:
        for name in ("", *names):
            content = memoryview(struct.pack("<Q", len(text)) + text) if not name else _bytes_of(data(name))
            file.write(content)
            size, crc = size + content.nbytes, zlib.crc32(content, crc)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(size, crc)


def _bytes_of(tensor: Tensor) -> memoryview:
    content: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def part_name(name: str, entry_shape: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> str:
    """The name of a part in its file: the tensor's own if it is whole."""
    return name if tuple(shape) == tuple(entry_shape) else f"{name}@{','.join(map(str, offsets))}"


class PartFiles:
    """Reads parts. It keeps the last file open, so read one file after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._name = ""
        self._file: Any = None

    def read(self, name: str, entry: Entry, part: Part, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of a part of the tensor ``name``; its start is counted within the part.

        Raises:
            ValueError: the file holds something else.
        """
        key = part_name(name, entry.shape, part.offsets, part.shape)
        path = self.directory / part.file
        try:
            file = self._open(part.file)
            found = file.get_slice(key)[_box(start, shape)] if part.shape else file.get_tensor(key)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if tuple(found.shape) != tuple(shape) or found.dtype != entry.dtype:
            raise ValueError(f"{path} is damaged: {key} is {found.dtype} {list(found.shape)}")
        return found

    def _open(self, name: str) -> Any:
        if name != self._name:
            self._file = safetensors.safe_open(self.directory / name, framework="pt")
            self._name = name
        return self._file


def read_tensors(directory: Path, index: Index, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin like this, whole and without that beginning."""
    wanted = {name: entry for name, entry in index.tensors.items() if name.startswith(prefix)}
    tensors = {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in wanted.items()}
    parts = [(part.file, name, part) for name, entry in wanted.items() for part in entry.parts]
    files = PartFiles(directory)
    for _, name, part in sorted(parts, key=lambda one: one[0]):
        value = files.read(name, wanted[name], part, (0,) * len(part.shape), part.shape)
        tensors[name][_box(part.offsets, part.shape)] = value
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _box(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))
