"""A dense MLP taken apart, and how its parts are read: projections, activation, norm, dropout.

Parts are matched on their exact classes, by full names, and what is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class DenseMLP:
    """A dense MLP taken apart; its parameters are the originals (or views of them), not copies.

    ``W_out norm(dropout(act(W_in x + b_in))) + b_out``, gated ``act(W_gate x + b_gate) * (W_in x + b_in)`` inside; norm
    and dropout where there are any.
    """

    in_weight: Tensor
    """[H, D]."""
    out_weight: Tensor
    """[D, H]."""
    in_bias: Tensor | None
    """[H]; in_bias and out_bias are both there or both None."""
    out_bias: Tensor | None
    """[D]."""
    activation: str
    """One of clipup_kernels.ACTIVATIONS."""
    gate_weight: Tensor | None = None
    """[H, D] of gated families."""
    gate_bias: Tensor | None = None
    """[H]."""
    ln_weight: Tensor | None = None
    """[H], of a layer norm between the projections; ln_weight and ln_bias are both there or both None."""
    ln_bias: Tensor | None = None
    """[H]."""
    ln_eps: float = 1e-5
    """What that norm adds to the variance."""
    dropout: float = 0.0
    """Probability with which an entry of the activation is dropped in training."""
    input_norm: nn.Module | None = None
    """A norm that x passes before the projections. It is no part of an expert: one for all, in front of the router."""

    def parameters(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in SparseMoE; what the MLP lacks is left out."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def class_name(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


_ACTIVATIONS: dict[str, str | Callable[[nn.Module], str]] = {
    "torch.nn.modules.activation.GELU": lambda act: {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate],
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "timm.layers.activations.Swish": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
}
_LAYER_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
)


def read_activation(module: nn.Module) -> str:
    """The activation's name in ``clipup_kernels.ACTIVATIONS``."""
    found = _ACTIVATIONS.get(class_name(module))
    if found is None:
        known = ", ".join(_ACTIVATIONS)
        raise TypeError(f"cannot read an MLP with activation {class_name(module)}; activations that are read: {known}")
    return found if isinstance(found, str) else found(module)


def read_linears(linears: dict[str, nn.Module], activation: nn.Module, **others: Any) -> DenseMLP:
    """The MLP of plain linear layers called "in", "out" and, where gated, "gate"; ``others`` are more of its fields."""
    check_linears(*linears.values())
    weights = {f"{name}_weight": linear.weight for name, linear in linears.items()}
    biases = {f"{name}_bias": linear.bias for name, linear in linears.items()}
    return assemble(**weights, **biases, activation=read_activation(activation), **others)


def check_linears(*linears: nn.Module) -> None:
    """Refuses whatever is no plain linear layer."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"cannot read an MLP whose projection is a {class_name(linear)}, expected a plain nn.Linear"
            )


def assemble(**fields: Any) -> DenseMLP:
    """A ``DenseMLP`` that the ops can compute: biases everywhere or nowhere, and as wide at its end as at its start."""
    if len({fields[name] is None for name in fields if name in ("in_bias", "gate_bias", "out_bias")}) > 1:
        raise TypeError("cannot read an MLP with a bias in only one of its projections")
    (hidden, width), out_shape = fields["in_weight"].shape, tuple(fields["out_weight"].shape)
    if out_shape != (width, hidden):
        raise TypeError(
            f"cannot read an MLP from width {width} over {hidden} to {out_shape[0]}; experts end as wide as they start"
        )
    return DenseMLP(**fields)


def read_norm(name: str, module: nn.Module) -> dict[str, Any]:
    """The fields of a norm between the projections; none for ``nn.Identity``."""
    if type(module) is nn.Identity:
        return {}
    if class_name(module) not in _LAYER_NORMS:
        raise TypeError(f"cannot read an MLP with a {class_name(module)} ({name}) between its projections")
    if module.weight is None or module.bias is None:
        raise TypeError(f"cannot read an MLP with a layer norm ({name}) that lacks weight or bias")
    return {"ln_weight": module.weight, "ln_bias": module.bias, "ln_eps": module.eps}


def read_dropout(name: str, module: nn.Module) -> float:
    """The probability of a dropout; 0 for ``nn.Identity``."""
    if type(module) not in (nn.Identity, nn.Dropout):
        raise TypeError(f"cannot read an MLP with a {class_name(module)} ({name}), expected a plain nn.Dropout")
    return module.p if type(module) is nn.Dropout else 0.0


def refuse_changed_forward(*parts: nn.Module) -> None:
    """Refuses an MLP that computes something else than its classes do: with hooks (those of pruning and of weight
    normalisation among them), or a ``forward`` of its own in a module. What is made of its weights would lose that."""
    for name, module in (named for part in parts for named in part.named_modules()):
        changed = "forward hooks" if module._forward_hooks or module._forward_pre_hooks else ""
        changed = "a forward of its own" if "forward" in vars(module) else changed
        if changed:
            raise TypeError(
                f"cannot read an MLP with {changed}{f' on {name}' if name else ''}: what is made of its weights would "
                "lose them; remove them first"
            )


def refuse_dropout(name: str, module: nn.Module) -> None:
    """Refuses a dropout behind the output projection that drops: the sparse layer ends with the weighted sum."""
    if read_dropout(name, module) > 0:
        raise TypeError(
            f"cannot read an MLP with {name}={module} behind its projections: the experts have no dropout there; "
            "create the model with a drop rate of 0"
        )
