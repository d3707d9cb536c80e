"""Models in int8 as tensors and a config, independent of the CPU that packed them, and their layers made of them again.

A prepared layer has, under its own name, the tensors of a ``SparseMoE``: the matrices ``in_weight``, ``out_weight`` and
``gate_weight``, [E, O, I] or [O, I] int8, and of each ``in_weight_scale``, [E, O] or [O] float32, of the output
channels, and ``in_weight_input``, [E, 2, I] or [2, I] float32, scales and shifts of the inputs
(``clipup_kernels.ops.packed_weights.QuantizedParts``); the biases, with the offsets of a calibration, and norms. All
other parameters and buffers have their own names and types. A tensor that several modules share is there once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipup_kernels.ops.packed_weights import QuantizedParts, pack_parts, quantized_parts
from clipup_kernels.types import type_name

from .. import checks
from .calibration import MATRICES
from .prepared import Prepared, Stored
from .selection import Selection

METHOD, VERSION = "clipup_int8", 1
_SUFFIXES = ("", "_scale", "_input")
"""Of a matrix's name, for each of its ``QuantizedParts``."""
_DTYPES = {type_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""open_clip's names of these types."""


def int8_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model in int8, also buffers that the state dict leaves out: on the meta device, where models are
    created to be loaded, buffers have no values."""
    tensors = {
        f"{prefix}{name}{suffix}": part.clone(memory_format=torch.contiguous_format)  # they share memory
        for prefix, layer in _prepared(model)
        for name in layer._packed
        for suffix, part in zip(_SUFFIXES, quantized_parts(layer.packed(name)), strict=True)  # type: ignore[arg-type]
    }
    return tensors | {name: value.detach() for name, value in values_of(model).values()}


def int8_config(model: nn.Module) -> dict[str, Any]:
    """What the config file says of a model in int8: the type of the features between its layers, and the layers in int8
    with the errors of those that were calibrated.

    Raises:
        ValueError: the layers were prepared in several types.
    """
    layers = dict(_prepared(model))
    dtype, *others = {type_name(layer.dtype) for layer in layers.values()}
    if others:
        raise ValueError(f"model has int8 layers in {dtype} and {others[0]}; cast the plain model to one type")
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "dtype": dtype,
        "layers": {prefix[:-1]: layer.error for prefix, layer in layers.items()},
    }


def int8_dtype(config: Any, source: str) -> torch.dtype:
    """The type in ``int8_config``.

    Raises:
        ValueError: this version does not read such a model.
    """
    config = config if isinstance(config, dict) else {}
    if (config.get("quant_method"), config.get("version")) != (METHOD, VERSION) or config.get("dtype") not in _DTYPES:
        raise ValueError(
            f"{source}: quantization_config is {checks.shown(config)}, but this version of clipup reads {METHOD} of "
            f"version {VERSION} in {', '.join(_DTYPES)}; install a newer one, or make the model again from the plain "
            "one"
        )
    return _DTYPES[config["dtype"]]


class StoredLayer(NamedTuple):
    """A layer of a plain model that is stored in int8."""

    plain: nn.Module
    kind: type[Prepared]
    dtype: torch.dtype
    error: float | None

    def expected(self) -> dict[str, Tensor]:
        """Its tensors on the meta device, by their names in the layer. A calibrated layer has all biases."""
        expected: dict[str, tuple[Sequence[int], torch.dtype]] = {}
        for name, tensor in self.kind.tensors(self.plain).items():
            if name not in MATRICES:
                expected[name] = tensor.shape, self.dtype
                continue
            *lead, rows, columns = tensor.shape
            parts = ((tensor.shape, torch.int8), ((*lead, rows), torch.float32), ((*lead, 2, columns), torch.float32))
            expected |= {name + suffix: part for suffix, part in zip(_SUFFIXES, parts, strict=True)}
            if self.error is not None:
                expected[name.replace("weight", "bias")] = (*lead, rows), self.dtype
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in expected.items()}

    def stored(self, tensors: dict[str, Tensor]) -> Stored:
        """The tensors of ``expected``, packed for this CPU."""
        weights = {
            name: pack_parts(QuantizedParts(*(tensors.pop(name + suffix) for suffix in _SUFFIXES)), self.dtype)
            for name in MATRICES
            if name in tensors
        }
        return Stored(weights, tensors, self.error)


def stored_layers(model: nn.Module, config: dict[str, Any], source: str) -> dict[str, StoredLayer]:
    """The layers of a plain model that ``int8_config`` says are in int8, by how the names of their tensors begin.

    Raises:
        ValueError: as ``int8_dtype``.
        RuntimeError: no kernel here multiplies int8.
    """
    dtype, errors = int8_dtype(config, source), config.get("layers", {})
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[layer]}.".lstrip("."): StoredLayer(layer, kind, dtype, errors[names[layer]])
        for layer, kind in Selection(model, "int8").chosen.items()
        if names[layer] in errors
    }


def _prepared(model: nn.Module) -> Iterator[tuple[str, Prepared]]:
    """The prepared layers, with how the names of their tensors begin."""
    for name, module in model.named_modules():
        if isinstance(module, Prepared):
            yield f"{name}.".lstrip("."), module


def places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every parameter and buffer that is not a packed weight: its full name, the dictionary that has it, and its name
    there. A shared tensor has several places, a shared module one."""
    for path, module in model.named_modules():
        packed = {f"{name}_packed" for name in getattr(module, "_packed", ())}
        for own in (module._parameters, module._buffers):
            for name in [name for name, value in own.items() if value is not None and name not in packed]:
                yield f"{path}.{name}" if path else name, own, name


def values_of(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """The tensors of ``places`` by their identities, each with its first name."""
    values: dict[int, tuple[str, Tensor]] = {}
    for name, own, key in places(model):
        values.setdefault(id(own[key]), (name, own[key]))
    return values
