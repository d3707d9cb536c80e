"""Dense layers that hold packed weights instead of plain ones, for inference on CPUs; made by ``clipup.accelerate``.

Packing happens once, ahead of time. A prepared layer has no plain weights that could be trained or written to, so there
is one copy of each weight and none can go stale. It loads no weights. Its state dict is that of the plain layer. It
keeps an empty copy of that layer: what reads the tensors of a plain layer also says where the state dict has them.

Axis legend: ``D`` model width, ``H`` hidden width, ``E`` experts.
"""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipup_kernels import PackedWeight, dense_mlp, pack_weight, packed_layout, unpack_weight

from ..dense.dense_mlp import FirstLinear, is_changed
from ..dense.mlp_families import read_mlp
from ..precision import autocast_dtype
from .calibration import BIASES, MATRICES, Calibration, Inputs, balanced, hidden_rows

_NO_BLOCK = torch.empty(0, dtype=torch.uint8)
_ONLY_INFERENCE = (
    "its weights are packed for inference; train, cast or move the plain model and prepare it again with "
    "clipup.accelerate"
)


class Stored(NamedTuple):
    """The tensors of a prepared layer by their names in ``SparseMoE``."""

    weights: Mapping[str, PackedWeight]
    others: Mapping[str, Tensor]
    """Biases, with the offsets of a calibration, and norms."""
    error: float | None = None
    """``Calibration.error``."""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], quantize: str | None, calibration: Calibration | None) -> Stored:
        """Those of a plain layer, packed; the others are not copied."""
        inputs = calibration.inputs if calibration else {} if quantize is None else balanced(tensors)
        weights = {
            name: pack_weight(tensors[name], quantize, *inputs.get(name, ())) for name in MATRICES if name in tensors
        }
        if calibration is not None:
            tensors |= _with_offsets(tensors, inputs)
        others = {name: tensor for name, tensor in tensors.items() if name not in MATRICES}
        return cls(weights, others, None if calibration is None else calibration.error)


class Prepared(nn.Module):
    """Base of prepared layers: packed weights, and the refusals of what they do not support."""

    is_prepared = True
    """Read by ``checks.plain_weights``."""
    centred: tuple[str, ...] = ("out_weight",)
    """Matrices of hidden activations, whose rows int8 kernels quantize around their middles."""
    quantize: str | None
    """None, or how the matrices are quantized (``clipup_kernels.pack_weight``)."""
    _packed: dict[str, PackedWeight]
    """Without their blocks, which are buffers."""
    _plain: tuple[nn.Module]
    """The plain layer on the meta device; in a tuple, so that it is not registered as a submodule."""

    error: float | None
    """``Calibration.error``; None if the layer was not calibrated."""

    def __init__(self, plain: Any, quantize: str | None = None, source: Calibration | Stored | None = None) -> None:
        super().__init__()
        self._prepare(plain, quantize, source)
        self.train(False)

    @classmethod
    def of(cls, plain: Any, quantize: str | None = None, source: Calibration | Stored | None = None) -> Prepared:
        """The prepared layer that replaces a plain one."""
        return cls(plain, quantize, source)

    def placed(self, parent: nn.Module) -> None:
        """Called after the layer was put into a module."""

    @staticmethod
    def read(plain: Any) -> Mapping[str, Tensor | None]:
        """The tensors of a plain layer by their names in ``SparseMoE``: its parameters, or views of them."""
        raise NotImplementedError

    @classmethod
    def tensors(cls, plain: Any) -> dict[str, Tensor]:
        """Those of ``read`` that there are, without gradients."""
        return {name: tensor.detach() for name, tensor in cls.read(plain).items() if tensor is not None}

    @staticmethod
    def seen(plain: Any) -> Callable[..., list[dict[str, Tensor]]]:
        """A function of the arguments of a plain layer's call: of every expert (one in a dense layer), the inputs
        [.., I] of its matrices by their names. Those of the second matrix of an MLP are left to ``hidden``."""
        return lambda *args, **kwargs: [{"in_weight": first_of(*args, **kwargs)}]

    @staticmethod
    def hidden(plain: Any, expert: int, x: Tensor) -> Tensor:
        """The inputs [N, H] of an MLP's "out_weight", from those of "in_weight", [N, D]."""
        raise NotImplementedError

    def _prepare(self, plain: nn.Module, quantize: str | None, source: Calibration | Stored | None) -> None:
        """Keeps matrices packed, others (biases) as buffers: those of a plain layer, which keeps its own, or stored
        ones, for which the plain layer may be on the meta device."""
        stored = source if isinstance(source, Stored) else Stored.of(self.tensors(plain), quantize, source)
        self.quantize, self._packed, self.error = quantize, {}, stored.error
        for name, weight in stored.weights.items():
            self._keep(name, weight)
        for name, tensor in stored.others.items():
            self.register_buffer(name, tensor.clone(), persistent=False)
        # contiguous, so that what ``read`` gives of a filled copy are views
        empty = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in plain.parameters()}
        self._plain = (copy.deepcopy(plain, empty),)

    def _keep(self, name: str, weight: PackedWeight) -> None:
        self.register_buffer(f"{name}_packed", weight.block, persistent=False)  # torch.export lifts buffers
        self._packed[name] = weight._replace(block=_NO_BLOCK)

    def packed(self, name: str) -> PackedWeight | None:
        """A weight by its name in ``SparseMoE``; None if the layer has none."""
        if name not in self._packed:
            return None
        _, *rest = self._packed[name]
        block = self._buffers[f"{name}_packed"]
        assert block is not None
        return PackedWeight._make((block, *rest))  # torch.compile cannot trace a call of the class

    in_weight = property(lambda self: self.packed("in_weight"))
    out_weight = property(lambda self: self.packed("out_weight"))
    gate_weight = property(lambda self: self.packed("gate_weight"))
    c_fc = property(lambda self: FirstLinear(self.in_weight))

    @property
    def dtype(self) -> torch.dtype:
        """The type that x must have."""
        return self._packed["in_weight"].dtype

    def plain(self) -> nn.Module:
        """The plain layer on the meta device."""
        return self._plain[0]

    def _check_type(self, x: Tensor) -> None:
        wanted = autocast_dtype(x) or x.dtype
        if wanted != self.dtype:
            raise TypeError(
                f"x, or autocast, is {wanted}, but the layer was prepared in {self.dtype}; cast the plain model and "
                f"prepare that: clipup.accelerate(model.to({wanted}))"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        for plain in vars(self).get("_plain", ()):
            if name in {*plain._parameters, *plain._modules} - {*self._buffers, *self._modules}:
                raise AttributeError(f"{name} of a prepared layer cannot be set: {_ONLY_INFERENCE}")
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Prepared:
        if mode:
            # nn.Module.train has set the modes of the modules on the way here, before it asked: they go back
            for frame, _ in traceback.walk_stack(sys._getframe()):
                if frame.f_code.co_name == "train" and isinstance(frame.f_locals.get("self"), nn.Module):
                    frame.f_locals["self"].eval()
            raise RuntimeError(f"a prepared layer has no training mode: {_ONLY_INFERENCE}")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.dtype != self.dtype or moved.device.type != "cpu":
            raise RuntimeError(
                f"a prepared layer stays on the CPU and of type {self.dtype}, and cannot become {moved.dtype} on "
                f"{moved.device}: {_ONLY_INFERENCE}"
            )
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def _filled(self) -> nn.Module:
        """The plain layer with its weights."""
        plain = copy.deepcopy(self._plain[0]).to_empty(device="cpu")
        for name, tensor in self.read(plain).items():
            if tensor is not None:
                packed = self.packed(name)
                tensor.copy_(self.get_buffer(name) if packed is None else unpack_weight(packed))
        return plain

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.quantize is not None:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'the layer'} holds {self.quantize} weights, from which the state dict "
                "of the plain layer cannot be restored; save the plain model's, or pickle the prepared model"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: value for name, value in self._filled().state_dict().items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self._packed:  # they may have been packed on another CPU
            packed = self.packed(name)
            if packed is not None and packed.layout != packed_layout(packed.dtype, packed.quantization):
                self._keep(name, pack_weight(packed))


def quantization(model: nn.Module) -> str | None:
    """How the prepared layers of a model are quantized; None if they are not, or if there are none."""
    return next((module.quantize for module in model.modules() if isinstance(module, Prepared)), None)


def refuse_to_load(*args: Any) -> None:
    """A hook of every module with a prepared layer in it. It is called before the module's own tensors are loaded."""
    raise RuntimeError(
        "load_state_dict was called on a model that clipup.accelerate prepared, which loads no weights: load them into "
        "the plain model, then call clipup.accelerate"
    )


def first_of(*args: Any, **kwargs: Any) -> Any:
    """The first argument of a call, which may be given by its name."""
    return (*args, *kwargs.values())[0]


def _with_offsets(tensors: Mapping[str, Tensor], inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
    """The biases of all matrices, with what their products with the offsets of their inputs are."""
    biases = {}
    for name in (name for name in MATRICES if name in tensors):
        weight, bias = tensors[name], tensors.get(name.replace("weight", "bias"))
        product = (weight.double() @ inputs[name].offset.double()[..., None]).squeeze(-1)
        biases[name.replace("weight", "bias")] = (product if bias is None else product + bias).to(weight.dtype)
    return biases


def is_replaceable(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether a layer of these tensors can replace a module: the module computes, saves and loads what its class says,
    and stores nothing else."""
    if any(map(is_changed, module.modules())) or next(module.buffers(), None) is not None:
        return False
    parameters = list(module.parameters())
    if any(type(parameter) is not nn.Parameter or parameter.layout != torch.strided for parameter in parameters):
        return False
    stored = sum(tensor.numel() for tensor in tensors.values() if tensor is not None)
    return stored == sum(parameter.numel() for parameter in parameters)


class PreparedMLP(Prepared):
    """A dense MLP for inference on ``clipup_kernels.dense_mlp``: the MLP's results up to rounding, or quantization."""

    def __init__(self, mlp: nn.Module, quantize: str | None = None, source: Calibration | Stored | None = None) -> None:
        super().__init__(mlp, quantize, source)
        dense = read_mlp(mlp)
        self.activation = dense.activation
        named = mlp.named_children()
        self.input_norm_name = next((name for name, module in named if module is dense.input_norm), None)
        if self.input_norm_name is not None:
            self.add_module(self.input_norm_name, dense.input_norm)
            self._plain[0].add_module(self.input_norm_name, nn.Identity())

    def plain(self) -> nn.Module:
        if self.input_norm_name is not None:
            self._plain[0].add_module(self.input_norm_name, getattr(self, self.input_norm_name))
        return self._plain[0]

    @staticmethod
    def read(plain: nn.Module) -> Mapping[str, Tensor | None]:
        return read_mlp(plain).parameters()

    @staticmethod
    def seen(plain: nn.Module) -> Callable[..., list[dict[str, Tensor]]]:
        norm = read_mlp(plain).input_norm

        def inputs(*args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
            x = first_of(*args, **kwargs)
            return [{"in_weight": x if norm is None else norm(x)}]

        return inputs

    @staticmethod
    def hidden(plain: nn.Module, expert: int, x: Tensor) -> Tensor:
        dense = read_mlp(plain)
        return hidden_rows(dense.parameters(), x, dense.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] in the type in which the MLP was prepared."""
        self._check_type(x)
        if self.input_norm_name is not None:
            x = getattr(self, self.input_norm_name)(x)
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        in_bias, out_bias, gate_bias = (getattr(self, name, None) for name in BIASES)
        y = dense_mlp(
            rows, self.in_weight, in_bias, self.out_weight, out_bias, self.activation, self.gate_weight, gate_bias
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        hidden, width = self.in_weight.shape
        return f"{width}, {hidden}, activation={self.activation!r}, quantize={self.quantize!r}"
