"""Weights from files: safetensors, and what ``torch.save`` wrote. Nothing in a file is ever executed.

A training checkpoint is open_clip's dictionary, ``{"state_dict": ..., "epoch": ..., ...}``, whose names may begin with
"module." as DistributedDataParallel has them. Those of ``clipup train`` hold ``moe_cfg`` too, None for a dense model.
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

from ..moe.config import MoEConfig

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


_ROUTER = ".router.weight"


_AT_ONCE = 1 << 24


_IS_FOLDER = 0x10


_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class Weights(NamedTuple):
    """A state dict on the CPU, and the config of its sparse layers where the file has one."""

    state_dict: dict[str, Tensor]
    moe_config: MoEConfig | None

    @property
    def sparse(self) -> bool:
        """Whether there are sparse layers in it."""
        return any(name.endswith(_ROUTER) for name in self.state_dict)

    @property
    def types(self) -> dict[str, torch.dtype]:
        """The tensors' types by name."""
        return {name: value.dtype for name, value in self.state_dict.items() if isinstance(value, Tensor)}


def read_weights(path: str | Path) -> Weights:
    """The weights of a file: safetensors, a training checkpoint, or a state dict by itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not whole, holds more than tensors and plain values, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected weights as safetensors or a checkpoint")
    if path.suffix == ".safetensors":
        return Weights(unwrapped(read_safetensors(path)), None)
    check_archive(path)
    content = read_pickle(path, mmap=True)
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no weights: expected a state dict, or a dictionary with a state_dict")
    moe_cfg = content.get("moe_cfg") if state_dict is not content else None
    return Weights(unwrapped(state_dict), None if moe_cfg is None else MoEConfig.from_dict(moe_cfg))


def types_in_safetensors(path: Path) -> dict[str, torch.dtype]:
    """The types of a safetensors file's tensors, by name, from its header alone; raises ``ValueError`` when the file is
    not whole."""
    types = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                part = file.get_slice(name)
                types[name] = part[:0].dtype if part.get_shape() else file.get_tensor(name).dtype
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return types


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ``ValueError`` when it is not whole."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_archive(path: Path, alone: str | None = None) -> None:
    """Compares what ``torch.save`` wrote with the checksums in the file, which ``torch.load`` does not look at.

    Args:
        alone: compares the one record whose name ends like this, instead of all. Files of the format before torch 1.6
            have no checksums.

    Raises:
        ValueError: the file is damaged. OSError: it could not be read.
    """
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.external_attr & _IS_FOLDER:  # torch would take its tensor from memory that nobody has set
                    raise ValueError(f"{record.filename} is marked as a folder")
                if alone is None or record.filename.endswith(alone):
                    with archive.open(record) as content:
                        while content.read(_AT_ONCE):
                            pass
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # the place of a record lies outside of the file
            raise ValueError(f"{path} is damaged: {error}") from error
        raise
    except Exception as error:  # what is wrong with a damaged archive has many types
        raise ValueError(f"{path} is damaged: {error}") from error


def _is_archive(path: Path) -> bool:
    """Whether the file begins as a zip archive does, which is what torch goes by."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_pickle(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A dictionary that ``torch.save`` wrote, of tensors and plain values, on the CPU.

    Args:
        mmap: maps the tensors into memory where the format allows, so that those that are not used are not read.

    Raises:
        ValueError: the file is broken, holds no dictionary, or could only be read by running code that it names.
        OSError: the file could not be read.
    """
    mmap = mmap and _is_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is broken, or holds more than tensors and plain values"
            f"{f' ({named[1]})' if named else ''}. Nothing in it was run, and nothing is: get the weights as "
            "safetensors, or have someone who trusts the file save its state dict alone"
        ) from error
    except Exception as error:  # a broken file shows as one of many types, from zipfile or torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def unwrapped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict under the names that the model itself has, without those of the wrappers around it."""
    return {_WRAPPERS.sub("", name): value for name, value in state_dict.items()}


_SHOWN = 3


def check_fit(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    ignore: tuple[str, ...] = (),
    *,
    described_by: str,
) -> None:
    """Compares a state dict with a model's, by names, shapes and kinds of types, before anything is copied.

    Args:
        source: where the weights come from. described_by: what says which model is meant; both for the message.

    Raises:
        ValueError: naming the parameters (up to three of each kind), both shapes, and what to do.
    """
    expected = model.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    faults = [
        f"{name} is {list(weights[name].shape)} there, {list(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in weights and name not in ignore and weights[name].shape != tensor.shape
    ]
    faults = faults[:_SHOWN] + [f"{len(faults) - _SHOWN} more of another shape"] * (len(faults) > _SHOWN)
    faults += _other_types(expected, {name: tensor.dtype for name, tensor in weights.items()})
    faults += _names("missing there", [name for name in expected if name not in weights])
    faults += _names("unknown to the model", [name for name in weights if name not in expected])
    if faults:
        raise ValueError(
            f"the weights in {source} do not fit the model that {described_by} describes: {'; '.join(faults)}. "
            "Put back the config that they were saved with, or save the model again"
        )


def check_types(model: nn.Module, types: Mapping[str, torch.dtype], source: str) -> None:
    """Refuses weights that torch would convert without a word: integers, truth values and complex numbers in the place
    of floating-point numbers, or the other way round.

    Args:
        types: those of the file's tensors, by name; names that the model does not have are left to others.

    Raises:
        ValueError: naming up to three parameters, and both types.
    """
    faults = _other_types(model.state_dict(), types)
    if faults:
        raise ValueError(
            f"the weights in {source} do not fit the model: {'; '.join(faults)}. Get them in a floating-point type"
        )


def _other_types(expected: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> list[str]:
    faults = [
        f"{name} is {types[name]} there, {tensor.dtype} in the model"
        for name, tensor in expected.items()
        if name in types and types[name].is_floating_point != tensor.dtype.is_floating_point
    ]
    return faults[:_SHOWN] + [f"{len(faults) - _SHOWN} more of another type"] * (len(faults) > _SHOWN)


def _names(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{kind}: {', '.join(names[:_SHOWN])}{rest}"]
