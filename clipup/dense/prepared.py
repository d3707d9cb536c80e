"""Dense layers that hold packed weights instead of plain ones, for inference on CPUs; made by ``clipup.accelerate``.

Packing happens once, ahead of time. A prepared layer has no plain weights that could be trained or written to, so there
is one copy of each weight and none can go stale. Its state dict is that of the plain layer.

Axis legend: ``D`` model width, ``H`` hidden width, ``E`` experts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipup_kernels import PackedWeight, dense_mlp, pack_weight, packed_layout, unpack_weight

from .. import checks
from ..precision import autocast_dtype
from .dense_mlp import DenseMLP, has_another_forward
from .mlp_families import read_mlp

MATRICES = ("in_weight", "out_weight", "gate_weight")
"""Names, in ``SparseMoE`` and ``DenseMLP``, of the parameters that are packed."""
_SHARED_INPUT = ("in_weight", "gate_weight")
_NO_BLOCK = torch.empty(0, dtype=torch.uint8)


class Part(NamedTuple):
    """The location of one of ``DenseMLP``'s tensors in a parameter of the MLP, which may hold several."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Stored(NamedTuple):
    """A parameter of the plain layer as stored in a state dict."""

    shape: torch.Size
    dtype: torch.dtype
    parts: list[Part]


def whole(name: str, parameter: Tensor) -> Stored:
    """A parameter that is one tensor of the prepared layer."""
    contiguous = torch.empty(parameter.shape, device="meta").stride()
    return Stored(parameter.shape, parameter.dtype, [Part(name, parameter.shape, contiguous, 0)])


_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def plain_entries(module: nn.Module) -> set[str] | None:
    """The names in the state dict of a module that does what its classes say when it is called, saved and loaded, and
    holds nothing but parameters in dense memory; None for others, whose place no prepared layer can take."""
    for part in module.modules():
        if any(getattr(part, hooks) for hooks in _HOOKS) or has_another_forward(part) or part._buffers:
            return None
    entries = module.state_dict(keep_vars=True)
    plain = all(type(p) is nn.Parameter and p.layout is torch.strided and not p.is_nested for p in entries.values())
    return set(entries) if plain else None


class _TypeOnly(NamedTuple):
    """Provides ``block.mlp.c_fc.weight.dtype``, from which open_clip's blocks read the type of the tower."""

    weight: PackedWeight


class Prepared(nn.Module):
    """Base of prepared layers: packed weights, and the refusals of what they do not support."""

    _stored: dict[str, Stored]
    _packed: dict[str, PackedWeight]
    quantize: str | None
    """None, or how the matrices are quantized (``clipup_kernels.pack_weight``)."""

    def _prepare(self, tensors: Mapping[str, Tensor], stored: dict[str, Stored], quantize: str | None) -> None:
        """Stores ``tensors``: matrices packed, others (biases) as buffers."""
        self._stored, self._packed, self.quantize = stored, {}, quantize
        self._put(tensors)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        if self.quantize is not None and tensors.keys() & _SHARED_INPUT:  # both have the same input scales
            tensors = {name: self._get(name) for name in _SHARED_INPUT if name in self._packed} | dict(tensors)
        self._keep(pack_matrices(tensors, self.quantize))
        for name, tensor in tensors.items():
            if name not in MATRICES:
                self.register_buffer(name, tensor.detach().clone(), persistent=False)

    def _keep(self, packed: Mapping[str, PackedWeight]) -> None:
        for name, weight in packed.items():
            self.register_buffer(f"{name}_packed", weight.block, persistent=False)  # torch.export lifts buffers
            self._packed[name] = weight._replace(block=_NO_BLOCK)

    def _get(self, name: str) -> Tensor:
        packed = self.packed(name)
        return getattr(self, name) if packed is None else unpack_weight(packed)

    def packed(self, name: str) -> PackedWeight | None:
        """A weight by its name in ``SparseMoE``; None if the layer has none."""
        if name not in self._packed:
            return None
        _, *rest = self._packed[name]
        return PackedWeight._make((self._block(name), *rest))  # torch.compile cannot trace a call of the class

    def _block(self, name: str) -> Tensor:
        block = self._buffers[f"{name}_packed"]
        assert block is not None
        return block

    in_weight = property(lambda self: self.packed("in_weight"))
    out_weight = property(lambda self: self.packed("out_weight"))
    gate_weight = property(lambda self: self.packed("gate_weight"))
    c_fc = property(lambda self: _TypeOnly(self.in_weight))

    @property
    def dtype(self) -> torch.dtype:
        """The type that x must have."""
        return self._packed["in_weight"].dtype

    def _check_type(self, x: Tensor) -> None:
        checks.tensor("x", x)
        autocast = autocast_dtype(x)
        wanted = autocast or x.dtype
        if wanted == self.dtype:
            return
        if not wanted.is_floating_point:
            raise TypeError(f"x is {wanted}, but the layer was prepared in {self.dtype}; pass that")
        where = "x is" if autocast is None else "autocast asks for"
        raise TypeError(
            f"{where} {wanted}, but the layer was prepared in {self.dtype}; cast the plain model and prepare that: "
            f"clipup.accelerate(model.to({wanted}))"
        )

    # ------------------------------------------------------------ refusals

    def _is_plain(self, name: str) -> bool:
        """Whether the plain layer has a parameter of this name, or a module with parameters."""
        return name in {stored.partition(".")[0] for stored in vars(self).get("_stored", ())}

    def __getattr__(self, name: str) -> Any:
        if self._is_plain(name):
            raise AttributeError(
                f"{name} of a prepared layer is packed; read it from the plain model, or from state_dict()"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MATRICES or (self._is_plain(name) and name not in self._buffers):
            raise AttributeError(f"{name} of a prepared layer cannot be set: {_ONLY_INFERENCE}")
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Prepared:
        if mode:
            raise RuntimeError(f"a prepared layer has no training mode: {_ONLY_INFERENCE}")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Prepared:
        if requires_grad:
            raise RuntimeError(f"a prepared layer cannot require gradients: {_ONLY_INFERENCE}")
        return super().requires_grad_(False)

    def reset_parameters(self) -> None:
        raise RuntimeError(f"a prepared layer cannot be re-initialized: {_ONLY_INFERENCE}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        probe = torch.empty(0, dtype=self.dtype)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise RuntimeError(
                f"a prepared layer stays on the CPU and of type {self.dtype}, and cannot become {moved.dtype} on "
                f"{moved.device}: {_ONLY_INFERENCE}"
            )
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------ the plain layer's state dict

    def _plain(self, name: str) -> Tensor:
        """A parameter of the plain layer, reassembled."""
        stored = self._stored[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for part in stored.parts:
            whole.as_strided(part.size, part.stride, part.offset).copy_(self._get(part.name))
        return whole

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.quantize is not None:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'the layer'} holds {self.quantize} weights, from which the state dict "
                "of the plain layer cannot be restored; save the plain model's, or pickle the prepared model"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters:  # copies like the others, so that writing to the state dict changes nothing here
            if prefix + name in destination:
                destination[prefix + name] = destination[prefix + name].clone()
        for name in self._stored:
            destination[prefix + name] = self._plain(name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {prefix + name: stored for name, stored in self._stored.items()}
        for key, value in [(key, state_dict[key]) for key in (*ours, *self._own_keys(prefix)) if key in state_dict]:
            if not isinstance(value, Tensor) or value.is_meta or value.dtype != self.dtype:
                kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                error_msgs.append(f"{key} is {kind}, expected a tensor of the prepared layer's type, {self.dtype}")
        if error_msgs:
            return
        loaded: dict[str, Tensor] = {}
        others = OrderedDict((key, value) for key, value in state_dict.items() if key not in ours)
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for key, stored in ours.items():
            value = state_dict.get(key)
            if value is None:
                missing_keys += [key] if strict else []
            elif value.shape != stored.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in "
                    f"current model is {stored.shape}."
                )
            else:
                whole = value.to(stored.dtype).contiguous()
                loaded |= {part.name: whole.as_strided(part.size, part.stride, part.offset) for part in stored.parts}
        self._put(loaded)

    def _own_keys(self, prefix: str) -> list[str]:
        return [prefix + name for name, parameter in self._parameters.items() if parameter is not None]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self._packed:  # they may have been packed on another CPU
            packed = self.packed(name)
            if packed is not None and packed.layout != packed_layout(packed.dtype, packed.quantization):
                self._keep({name: pack_weight(packed)})


def pack_matrices(tensors: Mapping[str, Tensor], quantize: str | None) -> dict[str, PackedWeight]:
    """Packed copies of the matrices among ``tensors``, by their names."""
    scales = {} if quantize is None else _input_scales(tensors)
    return {name: pack_weight(tensors[name], quantize, scales.get(name)) for name in MATRICES if name in tensors}


def _input_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The input scales, [.., I], of matrices [.., O, I] that are quantized, by their names.

    Where a norm makes some channels large, the weights that read them are small. The scale of an input is the square
    root of their size relative to the other inputs': half of what would make all columns equally large (SmoothQuant,
    arXiv 2211.10438, eq. 4 with alpha = 0.5, and 1 / size(W_j) in place of max|X_j|: no calibration data). The size is
    the root mean square over outputs, each weight relative to the largest of its output: that is what its rounding
    depends on, and so one outlier, which its output pays for anyway, costs the other outputs nothing.
    """
    groups = [[name for name in group if name in tensors] for group in (_SHARED_INPUT, ("out_weight",))]
    scales: dict[str, Tensor] = {}
    for group in groups:
        weights = [tensors[name].contiguous() for name in group]  # sums of other strides round differently
        if not weights or 0 in weights[0].shape:
            continue
        mean_squares = [
            (weight.float() / weight.abs().amax(-1, keepdim=True)).nan_to_num_(0.0).square_().mean(-2)  # 0 / 0: 0
            for weight in weights
        ]
        size = torch.stack(mean_squares).mean(0).sqrt()
        middle = size.median(-1, keepdim=True).values.clamp(min=1e-30)
        scales |= dict.fromkeys(group, (size / middle).clamp(1 / 1024, 1024).sqrt())
    return scales


_ONLY_INFERENCE = (
    "its weights are packed for inference; train, cast or move the plain model and prepare it again with "
    "clipup.accelerate"
)


class PreparedMLP(Prepared):
    """A dense MLP for inference on ``clipup_kernels.dense_mlp``: the MLP's results up to rounding, or quantization."""

    def __init__(self, mlp: nn.Module, quantize: str | None = None) -> None:
        super().__init__()
        dense = read_mlp(mlp)
        if not mlp_can_be_prepared(mlp, dense):
            raise TypeError(
                f"a {type(mlp).__name__} with a norm between its projections, or with hooks, buffers or parameters "
                "that are not its class's, cannot be prepared; leave it as it is"
            )
        self.activation = dense.activation
        self.input_norm_name = _input_norm_name(mlp, dense)
        if self.input_norm_name is not None:
            self.add_module(self.input_norm_name, dense.input_norm)
        self._prepare(dense.parameters(), _where_parts_lie(mlp, dense), quantize)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] in the type in which the MLP was prepared."""
        self._check_type(x)
        width = self.in_weight.shape[1]
        check_width("x", x, width)
        if self.input_norm_name is not None:
            x = getattr(self, self.input_norm_name)(x)
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        biases = (self._buffers.get(name) for name in ("in_bias", "out_bias", "gate_bias"))
        in_bias, out_bias, gate_bias = biases
        y = dense_mlp(
            rows, self.in_weight, in_bias, self.out_weight, out_bias, self.activation, self.gate_weight, gate_bias
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        hidden, width = self.in_weight.shape
        return f"{width}, {hidden}, activation={self.activation!r}, quantize={self.quantize!r}"


def check_width(name: str, x: Tensor, width: int) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"{name} must be [..., {width}], got {list(x.shape)}")


def mlp_can_be_prepared(mlp: nn.Module, dense: DenseMLP) -> bool:
    """Whether ``PreparedMLP`` computes and stores all that an MLP does, which was read as ``dense``."""
    names = plain_entries(mlp)
    if names is None or dense.ln_weight is not None:
        return False
    stored = _where_parts_lie(mlp, dense)
    of_norm = _input_norm_name(mlp, dense)
    beside = {name for name in names if of_norm is not None and name.startswith(f"{of_norm}.")}
    found = [part.name for where in stored.values() for part in where.parts]
    return names == stored.keys() | beside and sorted(found) == sorted(dense.parameters())


def _input_norm_name(mlp: nn.Module, dense: DenseMLP) -> str | None:
    return next((name for name, module in mlp.named_children() if module is dense.input_norm), None)


def _where_parts_lie(mlp: nn.Module, dense: DenseMLP) -> dict[str, Stored]:
    """The MLP's parameters by name, each with the tensors of ``dense`` that are views into it; without those whose
    order in memory is not that of their indices, unless one tensor is all of them."""
    parts = dense.parameters()
    stored = {}
    for name, parameter in mlp.named_parameters():
        begin = parameter.data_ptr()
        inside = [
            Part(part, t.shape, t.stride(), (t.data_ptr() - begin) // t.element_size())
            for part, t in parts.items()
            if begin <= t.data_ptr() < begin + parameter.nbytes
        ]
        all_of_it = [part for part, t in parts.items() if t is parameter]
        if all_of_it:
            stored[name] = whole(all_of_it[0], parameter)
        elif inside and parameter.is_contiguous():
            stored[name] = Stored(parameter.shape, parameter.dtype, inside)
    return stored
