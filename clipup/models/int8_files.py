"""Models in int8 as tensors and a config, independent of the CPU that packed them, and back.

A prepared layer has, under its own name, the tensors of a ``SparseMoE``: the matrices ``in_weight``, ``out_weight`` and
``gate_weight``, [E, O, I] or [O, I] int8, and of each ``in_weight_scale``, [E, O] or [O] float32, of the output
channels, and ``in_weight_input``, [E, 2, I] or [2, I] float32, scales and shifts of the inputs
(``clipup_kernels.ops.packed_weights.QuantizedParts``); the biases, with the offsets of a calibration, and norms. All
other parameters and buffers have their own names and types, also buffers that the state dict leaves out: a model is
loaded on the meta device, where they have no values. A tensor that several modules share is there once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipup_kernels.ops.packed_weights import QuantizedParts, pack_parts, quantized_parts
from clipup_kernels.types import type_name

from .. import checks
from ..clip.padding_aware import make_padding_aware
from ..inference.accelerate import replace_layers
from ..inference.calibration import MATRICES
from ..inference.prepared import Prepared, Stored
from ..inference.selection import Selection
from .model_directory import INT8
from .state_dicts import check_tensors

METHOD, VERSION = "clipup_int8", 1
_SUFFIXES = ("", "_scale", "_input")
"""Of a matrix's name, for each of its ``QuantizedParts``."""
_DTYPES = {type_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def int8_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model in int8."""
    tensors = {
        f"{prefix}{name}{suffix}": part
        for prefix, layer in _prepared(model)
        for name in layer._packed
        for suffix, part in zip(_SUFFIXES, quantized_parts(layer.packed(name)), strict=True)  # type: ignore[arg-type]
    }
    return tensors | {name: value.detach() for name, value in _values(model).values()}


def int8_config(model: nn.Module) -> dict[str, Any]:
    """What the config file says of a model in int8: the type of the features between its layers, and of calibrated
    layers the errors.

    Raises:
        ValueError: the layers were prepared in several types.
    """
    layers = dict(_prepared(model))
    dtype, *others = {type_name(layer.dtype) for layer in layers.values()}
    if others:
        raise ValueError(f"model has int8 layers in {dtype} and {others[0]}; cast the plain model to one type")
    errors = {prefix[:-1]: layer.error for prefix, layer in layers.items() if layer.error is not None}
    return {"quant_method": METHOD, "version": VERSION, "dtype": dtype, "errors": errors}


def int8_dtype(config: Any, source: str) -> torch.dtype:
    """The type in ``int8_config``.

    Raises:
        ValueError: this version does not read such a model.
    """
    config = config if isinstance(config, dict) else {}
    if (config.get("quant_method"), config.get("version")) != (METHOD, VERSION) or config.get("dtype") not in _DTYPES:
        raise ValueError(
            f"{source}: {INT8} is {checks.shown(config)}, but this version of clipup reads {METHOD} of version "
            f"{VERSION} in {', '.join(_DTYPES)}; install a newer one, or make the model again from the plain one"
        )
    return _DTYPES[config["dtype"]]


def load_int8(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> nn.Module:
    """Turns a plain model on the meta device into the accelerated one of these tensors.

    Args:
        config: ``int8_config``.
        tensors: ``int8_tensors``, perhaps memory-mapped: they are copied. Emptied.
        source: where they come from, for messages.

    Raises:
        ValueError: they do not fit the model.
        RuntimeError: no kernel here multiplies int8.
    """
    dtype, errors = int8_dtype(config, source), dict(config.get("errors") or ())
    make_padding_aware(model)
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    chosen, sources = {}, {}
    for layer, kind in Selection(model, "int8").chosen.items():
        prefix = prefixes[layer]
        if any(f"{prefix}in_weight{suffix}" in tensors for suffix in _SUFFIXES[1:]):  # others were excluded
            expected = _expected(prefix, kind.tensors(layer), tensors, dtype)
            own = {name: tensors.pop(name) for name in expected if name in tensors}
            check_tensors(expected, own, source, exact=True)
            own = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
            weights = {
                name: pack_parts(QuantizedParts(*(own.pop(name + suffix) for suffix in _SUFFIXES)), dtype)
                for name in MATRICES
                if name in own
            }
            chosen[layer], sources[layer] = kind, Stored(weights, own, errors.get(prefix[:-1]))
    model = replace_layers(model, chosen, "int8", sources)
    wanted = {number: place for number, place in _values(model).items() if place[1].is_meta}
    check_tensors(dict(wanted.values()), tensors, source)
    values = {number: tensors.pop(name).clone() for number, (name, _) in wanted.items()}
    for _, own, key in list(_places(model)):
        if (value := values.get(id(own[key]))) is not None:
            own[key] = nn.Parameter(value, False) if isinstance(own[key], nn.Parameter) else value
    return model


def _expected(
    prefix: str, plain: dict[str, Tensor], tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is stored of a layer with these plain tensors, on the meta device. Calibration may have added biases."""
    expected: dict[str, tuple[Sequence[int], torch.dtype]] = {}
    for name, tensor in plain.items():
        if name not in MATRICES:
            expected[name] = tensor.shape, dtype
            continue
        *lead, rows, columns = tensor.shape
        parts = ((tensor.shape, torch.int8), ((*lead, rows), torch.float32), ((*lead, 2, columns), torch.float32))
        expected |= {name + suffix: part for suffix, part in zip(_SUFFIXES, parts, strict=True)}
        bias = name.replace("weight", "bias")
        if prefix + bias in tensors:
            expected[bias] = (*lead, rows), dtype
    return {prefix + name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in expected.items()}


def _prepared(model: nn.Module) -> Iterator[tuple[str, Prepared]]:
    """The prepared layers, with how the names of their tensors begin."""
    for name, module in model.named_modules():
        if isinstance(module, Prepared):
            yield f"{name}." if name else "", module


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every parameter and buffer that is not a packed weight: its full name, the dictionary that has it, and its name
    there. A shared tensor has several places, a shared module one."""
    for path, module in model.named_modules():
        packed = {f"{name}_packed" for name in getattr(module, "_packed", ())}
        for own in (module._parameters, module._buffers):
            for name in [name for name, value in own.items() if value is not None and name not in packed]:
                yield f"{path}.{name}" if path else name, own, name


def _values(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """The tensors of ``_places`` by their identities, each with its first name."""
    values: dict[int, tuple[str, Tensor]] = {}
    for name, own, key in _places(model):
        values.setdefault(id(own[key]), (name, own[key]))
    return values


def plain_structure(model: nn.Module) -> nn.Module:
    """The plain model of a prepared one, on the meta device."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.to("meta")) if isinstance(value, nn.Parameter) else value.to("meta")
        for value in (*model.parameters(), *model.buffers())
    }
    model = copy.deepcopy(model, memo)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Prepared):
                module._modules[name] = child.plain()
    return model
