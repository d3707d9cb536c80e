"""Reads weights from safetensors and torch files without executing code, checks that they fit a model, and assigns
them with one copy of each in memory.

A training checkpoint is open_clip's dictionary, ``{"state_dict": ..., "epoch": ..., ...}``; names in it may have the
"module." prefix of DistributedDataParallel. Checkpoints of ``clipup train`` also have ``moe_cfg``, None for a dense
model.
"""

from __future__ import annotations

import errno
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import read_json, without_numpy
from ..moe.expert_parallel import shard_of
from . import shard_files
from .model_directory import CONFIG_NAME, WEIGHTS_NAME

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
_ROUTER = ".router.weight"
_CHUNK_BYTES = 1 << 24
_DIRECTORY_ATTRIBUTE = 0x10
_MAX_SHOWN = 5
_INITIALIZATIONS = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
"""The slow initializations that a mode can intercept."""
_CONFIG_BESIDE = {WEIGHTS_NAME: CONFIG_NAME, "model.safetensors": "config.json"}  # the latter of timm and transformers
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


def read_weights(path: str | Path) -> Weights:
    """Reads a file of weights: safetensors, a training checkpoint, or a plain state dict; or a sharded checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is incomplete, contains more than tensors and plain values, or has no weights.
    """
    path = Path(path)
    if shard_files.is_sharded(path):
        index = shard_files.read_index(path)
        shard_files.check_files(path, index, index.files)
        return Weights(shard_files.read_tensors(path, shard_files.MODEL), index.configs)
    if not path.is_file():
        what = f"{path} is a directory without weights" if path.is_dir() else f"there is no file {path}"
        raise FileNotFoundError(f"{what}; expected safetensors or a checkpoint (checkpoints/epoch_K of a run)")
    if path.suffix == ".safetensors":
        return Weights(strip_wrapper_prefixes(read_safetensors(path)), _configs_beside(path))
    check_archive(path)
    content = read_pickle(path, mmap=True)
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} has no weights: expected a state dict, or a dictionary with a state_dict")
    configs = {} if state_dict is content else {key: content[key] for key in _CONFIGS if key in content}
    return Weights(strip_wrapper_prefixes(state_dict), configs)


def _configs_beside(path: Path) -> dict[str, Any]:
    """The configs of the model directory that a file of weights is in, if the model is sparse."""
    beside = path.parent / _CONFIG_BESIDE.get(path.name, "")
    config = read_json(beside) if beside.is_file() else {}
    return {key: config[key] for key in _CONFIGS if key in config} if "moe_cfg" in config else {}


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
        with shard_files.reading(path), zipfile.ZipFile(path) as archive:
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
    with shard_files.reading(path), open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_pickle(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Reads a dictionary of tensors and plain values written by ``torch.save``, on the CPU.

    Args:
        mmap: memory-map the tensors if the format allows it, so that unused tensors are not read.

    Raises:
        ValueError: the file is damaged, is not a dictionary, or cannot be read without running code.
        OSError: the file could not be read.
    """
    mmap = mmap and _is_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file raises many types of errors, from zipfile, pickle or torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint, and no code in it was run: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a checkpoint")
    return content


def write_pickle(content: dict[str, Any], path: Path) -> None:
    """Writes with ``torch.save`` what ``read_pickle`` reads. Numbers of numpy become Python's.

    When writing breaks off, torch's archive writer raises a RuntimeError from its destructor instead of the reason.

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
    """The state dict without what wrappers add: prefixes of names (DistributedDataParallel, torch.compile), and the
    counter of torch's AveragedModel."""
    return {_WRAPPERS.sub("", name): value for name, value in state_dict.items() if name != "n_averaged"}


def check_tensors(
    expected: dict[str, Tensor],
    weights: dict[str, Tensor],
    source: str,
    ignore: tuple[str, ...] = (),
    exact: bool = False,
) -> None:
    """Checks that names, shapes and types of weights are those that a model needs.

    Args:
        expected: of the model.
        source: where the weights come from, for the error message.
        ignore: names whose shapes are not compared.
        exact: types must be equal. Otherwise every floating type is.

    Raises:
        ValueError: the weights do not fit. Names the first parameters, and both shapes.
    """
    weights = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    shared = [(name, weights[name], tensor) for name, tensor in expected.items() if name in weights]
    differences = [
        *(
            f"{name} is {list(stored.shape)} in the file, {list(tensor.shape)} in the model"
            for name, stored, tensor in shared
            if name not in ignore and stored.shape != tensor.shape
        ),
        *(
            f"{name} is {stored.dtype} in the file, {tensor.dtype} in the model"
            for name, stored, tensor in shared
            if stored.is_floating_point() != tensor.is_floating_point() or (exact and stored.dtype != tensor.dtype)
        ),
        *(f"{name} is missing from the file" for name in expected if name not in weights),
        *(f"{name} is not in the model" for name in weights if name not in expected),
    ]
    if differences:
        raise ValueError(f"the weights in {source} do not fit the model: {listed(differences)}")


def listed(differences: list[str]) -> str:
    """The first of many differences, for a message."""
    more = len(differences) - _MAX_SHOWN
    return "; ".join(differences[:_MAX_SHOWN]) + f"; and {more} more" * (more > 0)


class _SkipInitialization(TorchFunctionMode):
    """Skips initializations in this thread alone: other threads may create models with random weights meanwhile."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALIZATIONS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_random_numbers() -> Iterator[None]:
    """Skips the initialization of parameters created in this context, which stay uninitialized, and restores the global
    generator of random numbers."""
    with torch.random.fork_rng(devices=[]), _SkipInitialization():
        yield


def drop_parameters(model: nn.Module) -> None:
    """Replaces the parameters by meta tensors. Shared parameters stay shared; buffers are unchanged."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                vars(meta).update(vars(parameter))
                module._parameters[name] = moved.setdefault(id(parameter), meta)


def assign_weights(model: nn.Module, weights: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Assigns copies of ``weights``, in the model's dtypes, to a model whose parameters are meta tensors.

    Copies are needed because the tensors may be memory-mapped from a file that can change.

    Args:
        weights: must fit the model (``check_tensors``). Emptied one by one, to hold each in memory only once.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    copies = {}
    for name, wanted in model.state_dict().items():
        copies[name] = weights.pop(name).to(device=device, dtype=wanted.dtype, copy=True)
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    model.load_state_dict(copies, assign=True)
    for name, marked in marks.items():  # attributes such as no_weight_decay
        vars(model.get_parameter(name)).update(marked)
    for first, *others in shared.values():
        for other in others:
            path, _, name = other.rpartition(".")
            model.get_submodule(path)._parameters[name] = model.get_parameter(first)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite; None if all are finite. Of a DTensor only this
    rank's part is looked at.

    A buffer of zeros and -inf is accepted: it is an additive attention mask, which models have.
    """
    for name, tensor in tensors.items():
        part = shard_of(tensor).detach()
        if (
            part.is_floating_point()
            and part.numel()
            and not torch.linalg.vector_norm(part, math.inf).isfinite()
            and not ((part == 0) | (part == -math.inf)).all()
        ):
            return name
    return None
