"""Sparse layers that hold packed weights instead of plain ones, for inference on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipup_kernels import dispatch, expert_mlp
from clipup_kernels.ops.sparse_mlp import is_one_op, packed_sparse_mlp

from ..moe.experts import Experts, SharedExpert
from ..moe.layer import SHARED_GATE, SparseMoE
from ..moe.layer_state import LastRouting
from ..moe.router import Router
from .calibration import BIASES, MATRICES, Calibration, hidden_rows
from .prepared import Prepared, Stored


class _PreparedExperts(Prepared, Experts):
    """Experts whose matrices are packed; biases and norms are buffers."""

    @staticmethod
    def read(plain: nn.Module) -> Mapping[str, Tensor | None]:
        return dict(plain.named_parameters(recurse=False))

    @staticmethod
    def hidden(plain: Any, expert: int, x: Tensor) -> Tensor:
        tensors = {name: parameter[expert] for name, parameter in plain.named_parameters(recurse=False)}
        return hidden_rows(tensors, x, plain.activation, plain.norm_eps)

    @classmethod
    def of(cls, plain: Any, quantize: str | None = None, source: Calibration | Stored | None = None) -> Prepared:
        """A layer with the router, shared expert, options and hooks of plain experts."""
        weights = nn.Module()
        for name, parameter in plain.named_parameters(recurse=False):
            weights.register_parameter(name, parameter)
        absent = dict.fromkeys(plain._parameters.keys() - weights._parameters.keys() - {*MATRICES, *BIASES})
        layer = cls.__new__(cls)  # __init__ would draw new weights
        vars(layer).update(vars(plain), _parameters=absent, _buffers={}, _modules={**plain._modules})
        for name in BIASES:
            layer.register_buffer(name, None, persistent=False)  # calibration may add biases
        layer._prepare(weights, quantize, source)
        return layer

    def plain(self) -> nn.Module:
        base: Any = type(self).__bases__[1]
        layer = base.__new__(base)
        absent = dict.fromkeys((*MATRICES, *BIASES, *self._parameters))
        vars(layer).update(vars(self), _parameters=absent | self._plain[0]._parameters, _buffers={})
        return layer

    def expert_group(self) -> None:
        """Prepared experts are all in this process."""

    def operands(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return super().operands(None)  # packed weights keep the type in which they were prepared


class PreparedSharedExpert(_PreparedExperts, SharedExpert):
    """A shared expert in a ``PreparedMoE``."""

    @staticmethod
    def seen(plain: Any) -> Callable[..., list[dict[str, Tensor]]]:
        return lambda tokens, mask, *others: [{"in_weight": tokens if mask is None else tokens[mask]}]


class PreparedMoE(_PreparedExperts, SparseMoE):
    """A ``SparseMoE`` for inference, with bitwise identical results unless it is quantized."""

    @staticmethod
    def seen(plain: Any) -> Callable[..., list[dict[str, Tensor]]]:
        def inputs(x: Tensor, mask: Tensor | None = None) -> list[dict[str, Tensor]]:
            _, routing = SparseMoE.forward(plain, x, mask, return_routing=True)
            tokens = x.reshape(-1, x.shape[-1])
            chosen = routing.experts.masked_fill(~routing.kept, -1).view(len(tokens), -1)
            return [{"in_weight": tokens[(chosen == expert).any(-1)]} for expert in range(plain.config.num_experts)]

        return inputs

    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_routing: bool = False) -> Any:
        """``SparseMoE.forward``, as one op unless its parts are observed."""
        if return_routing:
            return super().forward(x, mask, return_routing=True)
        if (arguments := self._in_one_op(x)) is None:
            return super().forward(x, mask)
        self._check(x, mask)
        tokens = x.reshape(-1, self.d_model)
        token_mask = None if mask is None else mask.reshape(-1).bool()
        y, routing = packed_sparse_mlp(tokens, **arguments, mask=token_mask)
        if self.shared is not None:
            y = y + self.shared(tokens, token_mask, None, SHARED_GATE)
        self.state.keep_inference(lambda: LastRouting.of(*routing.unpack(), token_mask))
        return y.view_as(x)  # view(x.shape) takes three times as long

    def _in_one_op(self, x: Tensor) -> dict[str, Any] | None:
        """The arguments of ``packed_sparse_mlp``; None if the parts have to run one by one."""
        router, packed = self.router, self.in_weight
        if torch.compiler.is_compiling() or type(router) is not Router or not self.is_fused():
            return None
        routing = router.in_one_op() if is_one_op(packed) and x.dtype == packed.dtype else None
        return routing and {
            **routing,
            "in_weight": packed,
            "in_bias": self.in_bias,
            "out_weight": self.out_weight,
            "out_bias": self.out_bias,
            "activation": self.activation,
            "gate_weight": self.gate_weight,
            "gate_bias": self.gate_bias,
            "gate_scale": self.gate_scale(),
        }

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        self._check_type(x)
        super()._check(x, mask)


class PreparedRoutedExperts(Prepared):
    """The experts of an MoE model of transformers. The model's router, which stays as it is, chooses them."""

    def __init__(self, experts: Any, quantize: str | None = None, source: Calibration | Stored | None = None) -> None:
        super().__init__(experts, quantize, source)
        self.activation = routed_activation(experts)

    @staticmethod
    def read(plain: Any) -> Mapping[str, Tensor | None]:
        gate, projection = plain.gate_up_proj.chunk(2, 1) if plain.has_gate else (None, plain.up_proj)
        return {"in_weight": projection, "gate_weight": gate, "out_weight": plain.down_proj}

    @staticmethod
    def seen(plain: Any) -> Callable[..., list[dict[str, Tensor]]]:
        def inputs(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> list[dict[str, Tensor]]:
            return [
                {"in_weight": hidden_states[(top_k_index == expert).any(-1)]} for expert in range(len(plain.down_proj))
            ]

        return inputs

    @classmethod
    def hidden(cls, plain: Any, expert: int, x: Tensor) -> Tensor:
        return hidden_rows(
            {name: tensor[expert] for name, tensor in cls.tensors(plain).items()}, x, routed_activation(plain)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D] in the type in which the layer was prepared, top_k_index and top_k_weights [T, K] ->
        [T, D]."""
        self._check_type(hidden_states)
        gates = top_k_weights.to(torch.promote_types(self.dtype, torch.float32))
        plan = dispatch(top_k_index.to(torch.int32), self.in_weight.shape[0])
        in_bias, out_bias, gate_bias = (getattr(self, name, None) for name in BIASES)
        weights = self.in_weight, in_bias, self.out_weight, out_bias, self.activation, self.gate_weight, gate_bias
        return expert_mlp(hidden_states.to(self.dtype), gates, plan, *weights).to(hidden_states.dtype)


def is_routed_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of an MoE model of transformers, whose decorator sets this attribute."""
    return hasattr(module, "_is_expert_parallel")


def routed_activation(experts: nn.Module) -> str:
    """The activation of experts for which ``is_routed_experts`` holds.

    Raises:
        NotImplementedError: the experts have a part that ``expert_mlp`` does not compute; it is named.
    """
    from clipup_kernels.integrations.transformers import activation_of  # imports transformers, which is optional

    return activation_of(experts)
