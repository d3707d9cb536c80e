"""Reads weights from safetensors and torch files without executing code, and checks that they fit a model.

A training checkpoint is open_clip's dictionary, ``{"state_dict": ..., "epoch": ..., ...}``; names in it may have the
"module." prefix of DistributedDataParallel. Checkpoints of ``clipup train`` also have ``moe_cfg``, None for a dense
model.
"""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..checks import without_numpy
from . import shard_files

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


_ROUTER = ".router.weight"
_CHUNK_BYTES = 1 << 24
_DIRECTORY_ATTRIBUTE = 0x10
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_MAX_SHOWN = 3


_CONFIGS = ("model_cfg", "moe_cfg", "preprocess_cfg", "tokenizer_files")


class Weights(NamedTuple):
    """A state dict on the CPU, and the configs of its model, as far as the file has them."""

    state_dict: dict[str, Tensor]
    configs: dict[str, Any] = {}
    """``model_cfg``, ``moe_cfg``, ``preprocess_cfg``, ``tokenizer_files``, as they are in the file."""

    @property
    def sparse(self) -> bool:
        """Whether the state dict has sparse layers."""
        return any(name.endswith(_ROUTER) for name in self.state_dict)

    def on_meta(self) -> dict[str, Tensor]:
        """The dtypes and shapes of the tensors by name."""
        return {name: value.to("meta") for name, value in self.state_dict.items() if isinstance(value, Tensor)}


def read_weights(path: str | Path) -> Weights:
    """Reads a file of weights: safetensors, a training checkpoint, or a plain state dict; or a sharded checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is incomplete, contains more than tensors and plain values, or has no weights.
    """
    path = Path(path)
    if shard_files.is_sharded(path):
        return _read_sharded(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected weights as safetensors or a checkpoint")
    if path.suffix == ".safetensors":
        return Weights(strip_wrapper_prefixes(read_safetensors(path)))
    check_archive(path)
    content = read_pickle(path, mmap=True)
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} has no weights: expected a state dict, or a dictionary with a state_dict")
    configs = {} if state_dict is content else {key: content[key] for key in _CONFIGS if key in content}
    return Weights(strip_wrapper_prefixes(state_dict), configs)


def _read_sharded(directory: Path) -> Weights:
    index = shard_files.read_index(directory)
    shard_files.check_files(directory, index, index.files)
    return Weights(shard_files.read_tensors(directory, shard_files.MODEL), index.configs)


def safetensors_on_meta(path: Path) -> dict[str, Tensor]:
    """The dtypes and shapes of the tensors in a safetensors file by name, read from its header. Raises ``ValueError``
    if the file is incomplete."""
    found = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a mapping
                part = file.get_slice(name)
                few = part[:0] if part.get_shape() else file.get_tensor(name)
                found[name] = torch.empty(part.get_shape(), dtype=few.dtype, device="meta")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``ValueError`` if it is incomplete."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def check_archive(path: Path, suffix: str = "") -> None:
    """Verifies the checksums in a file from ``torch.save``, which ``torch.load`` ignores.

    Files in the format before torch 1.6 have no checksums.

    Args:
        suffix: verify only the records whose names end with this.

    Raises:
        ValueError: the file is damaged.
        OSError: the file could not be read.
    """
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.external_attr & _DIRECTORY_ATTRIBUTE:  # torch would read its tensor from uninitialized memory
                    raise ValueError(f"{record.filename} is marked as a directory")
                if record.filename.endswith(suffix):
                    with archive.open(record) as content:
                        while content.read(_CHUNK_BYTES):
                            pass
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a record lies outside of the file
            raise ValueError(f"{path} is damaged: {error}") from error
        raise
    except Exception as error:  # a damaged archive raises many types of errors
        raise ValueError(f"{path} is damaged: {error}") from error


def _is_archive(path: Path) -> bool:
    """Whether the file starts like a zip archive. torch uses the same criterion."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_pickle(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Reads a dictionary of tensors and plain values written by ``torch.save``, on the CPU.

    Args:
        mmap: memory-map the tensors if the format allows it, so that unused ones are not read.

    Raises:
        ValueError: the file is damaged, is not a dictionary, or cannot be read without running code.
        OSError: the file could not be read.
    """
    mmap = mmap and _is_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        code = _GLOBAL.search(str(error))
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or contains more than tensors and plain values"
            f"{f' ({code[1]})' if code else ''}. No code in it was run. Get the weights as safetensors, or have "
            "someone who trusts the file save its state dict alone"
        ) from error
    except Exception as error:  # a damaged file raises many types of errors, from zipfile or torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a checkpoint")
    return content


def write_pickle(content: dict[str, Any], path: Path) -> None:
    """Writes with ``torch.save`` what ``read_pickle`` reads. Numbers of numpy become Python's.

    When writing breaks off, torch's archive writer raises a RuntimeError from its destructor in place of the reason.

    Raises:
        OSError: the file could not be written.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        with open(path, "wb") as file:
            torch.save(without_numpy(content), file)
    except RuntimeError as error:
        reason = error.__context__
        if isinstance(reason, OSError) or (reason is not None and not isinstance(reason, Exception)):
            raise reason from error
        raise


def strip_wrapper_prefixes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict without the name prefixes that wrappers add (DistributedDataParallel, torch.compile)."""
    return {_WRAPPERS.sub("", name): value for name, value in state_dict.items()}


def check_fit(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    ignore: tuple[str, ...] = (),
    *,
    described_by: str,
) -> None:
    """Checks that weights fit a model: names, shapes, and floating-point versus other dtypes.

    Args:
        source: where the weights come from, for the error message.
        ignore: names whose shapes are not compared.
        described_by: what defines the model, for the error message.

    Raises:
        ValueError: the weights do not fit. Names up to three parameters of each kind, and both shapes.
    """
    expected = model.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    mismatches = [
        f"{name} is {list(weights[name].shape)} in the file, {list(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in weights and name not in ignore and weights[name].shape != tensor.shape
    ]
    mismatches = _shortened(mismatches, "more with different shapes")
    mismatches += _dtype_mismatches(expected, weights)
    mismatches += _list_names("missing from the file", [name for name in expected if name not in weights])
    mismatches += _list_names("not in the model", [name for name in weights if name not in expected])
    if mismatches:
        raise ValueError(
            f"the weights in {source} do not fit the model that {described_by} describes: {'; '.join(mismatches)}. "
            "Restore the config that they were saved with, or save the model again"
        )


def check_types(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Refuses weights that torch would convert silently: integers, booleans and complex numbers in place of
    floating-point numbers, or the reverse.

    Args:
        weights: the file's tensors by name. Names that the model does not have are ignored.

    Raises:
        ValueError: a dtype does not fit. Names up to three parameters, and both dtypes.
    """
    mismatches = _dtype_mismatches(model.state_dict(), weights)
    if mismatches:
        raise ValueError(
            f"the weights in {source} do not fit the model: {'; '.join(mismatches)}. Get them in a floating-point dtype"
        )


def _dtype_mismatches(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    mismatches = [
        f"{name} is {weights[name].dtype} in the file, {tensor.dtype} in the model"
        for name, tensor in expected.items()
        if name in weights and weights[name].is_floating_point() != tensor.is_floating_point()
    ]
    return _shortened(mismatches, "more with different dtypes")


def _shortened(mismatches: list[str], rest: str) -> list[str]:
    more = len(mismatches) - _MAX_SHOWN
    return mismatches[:_MAX_SHOWN] + [f"{more} {rest}"] * (more > 0)


def _list_names(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = len(names) - _MAX_SHOWN
    return [f"{kind}: {', '.join(names[:_MAX_SHOWN])}{f' and {more} more' if more > 0 else ''}"]
