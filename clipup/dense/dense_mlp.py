"""``DenseMLP``, a uniform view of a dense MLP, and readers of its parts: projections, activation, norm, dropout.

Parts are matched on their exact classes, by full names; unknown parts are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from clipup_kernels import ACTIVATIONS


@dataclass(frozen=True)
class DenseMLP:
    """The parts of a dense MLP; its parameters are the originals (or views of them), not copies.

    ``W_out norm(dropout(act(W_in x + b_in))) + b_out``, gated: ``act(W_gate x + b_gate) * (W_in x + b_in)`` inside;
    norm and dropout are optional.

    Raises:
        TypeError: only some projections have a bias, shapes do not fit, or types or devices differ; half of a norm; an
            unknown activation.
    """

    in_weight: Tensor
    """[H, D]."""
    out_weight: Tensor
    """[D, H]."""
    in_bias: Tensor | None
    """[H]; in_bias and out_bias are both present or both None."""
    out_bias: Tensor | None
    """[D]."""
    activation: str
    """One of clipup_kernels.ACTIVATIONS."""
    gate_weight: Tensor | None = None
    """[H, D], for gated families."""
    gate_bias: Tensor | None = None
    """[H]."""
    ln_weight: Tensor | None = None
    """[H], of a layer norm between the projections; ln_weight and ln_bias are both present or both None."""
    ln_bias: Tensor | None = None
    """[H]."""
    ln_eps: float = 1e-5
    """Added to that norm's variance."""
    dropout: float = 0.0
    """Probability of dropping an entry of the activation in training."""
    input_norm: nn.Module | None = None
    """A norm in front of the projections. It is not part of an expert: it stays in front of the router."""

    def __post_init__(self) -> None:
        linears = [name for name in ("in", "out", "gate") if getattr(self, f"{name}_weight") is not None]
        if len({getattr(self, f"{name}_bias") is None for name in linears}) > 1:
            raise TypeError(
                "cannot read an MLP with a bias in only some of its projections; give the others a bias of zeros"
            )
        if (self.ln_weight is None) != (self.ln_bias is None):
            raise TypeError("cannot read an MLP with a layer norm that lacks weight or bias")
        if self.activation not in ACTIVATIONS:
            raise TypeError(
                f"cannot read an MLP with activation {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        hidden, width = self.in_weight.shape
        shapes = {"in_weight": (hidden, width), "out_weight": (width, hidden), "gate_weight": (hidden, width)}
        for name, value in self.parameters().items():
            expected = shapes.get(name, (width,) if name == "out_bias" else (hidden,))
            if tuple(value.shape) != expected:
                raise TypeError(
                    f"cannot read an MLP whose {name} has shape {list(value.shape)}, not {list(expected)}: experts end "
                    "as wide as they start"
                )
        kinds = {(value.dtype, value.device) for name, value in self.parameters().items() if not name.startswith("ln_")}
        if len(kinds) > 1:
            raise TypeError(f"cannot read an MLP with projections of several types or devices, {kinds}; make them one")

    def parameters(self) -> dict[str, Tensor]:
        """The tensors by their names in SparseMoE; absent tensors are omitted."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def class_name(module: nn.Module) -> str:
    """The full class name of a module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def library_class(module: nn.Module) -> str:
    """The full name of a module's class before clipup made it padding-aware."""
    kind = next(base for base in type(module).__mro__ if not base.__module__.startswith("clipup."))
    return f"{kind.__module__}.{kind.__qualname__}"


_ACTIVATIONS: dict[str, str | Callable[[Any], str]] = {
    "torch.nn.modules.activation.GELU": lambda act: {"none": "gelu", "tanh": "gelu_tanh"}.get(
        act.approximate, str(act)
    ),
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "open_clip.layers.QuickGELU": "quick_gelu",  # open_clip 4
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
    "open_clip.layers.LayerNorm",  # open_clip 4
    "open_clip.layers.LayerNormFp32",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
)


def read_activation(module: nn.Module) -> str:
    """The activation's name in ``clipup_kernels.ACTIVATIONS``; of any other, its class name, which ``DenseMLP``
    refuses."""
    name = _ACTIVATIONS.get(class_name(module), class_name(module))
    return name if isinstance(name, str) else name(module)


def read_linears(linears: dict[str, nn.Module], activation: nn.Module, **others: Any) -> DenseMLP:
    """The MLP of plain linear layers named "in", "out" and, if gated, "gate"; ``others``: further fields."""
    check_linears(*linears.values())
    weights: dict[str, Any] = {f"{name}_weight": linear.weight for name, linear in linears.items()}
    biases: dict[str, Any] = {f"{name}_bias": linear.bias for name, linear in linears.items()}
    return DenseMLP(**weights, **biases, activation=read_activation(activation), **others)


def check_linears(*linears: nn.Module) -> None:
    """Refuses everything but plain linear layers."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"cannot read an MLP whose projection is a {class_name(linear)}, expected a plain nn.Linear"
            )


def read_norm(name: str, module: nn.Module) -> dict[str, Any]:
    """The fields of a norm between the projections; empty for ``nn.Identity``."""
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


def is_changed(module: nn.Module) -> bool:
    """Whether a module may compute, save or load something else than its class: hooks (pruning and weight
    normalization use them), or a ``forward`` assigned to it."""
    return "forward" in vars(module) or any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def refuse_changed(*parts: nn.Module) -> None:
    """Refuses an MLP with a changed module: experts made of its weights would lose the change."""
    for name, module in (named for part in parts for named in part.named_modules()):
        if is_changed(module):
            raise TypeError(
                f"cannot read an MLP with hooks or a forward of its own{f' on {name}' if name else ''}: experts made "
                "of its weights would lose them; remove them first"
            )


def refuse_dropout(name: str, module: nn.Module) -> None:
    """Refuses an active dropout after the output projection: a sparse layer ends with the weighted sum."""
    if read_dropout(name, module) > 0:
        raise TypeError(
            f"cannot read an MLP with {name}={module} after its projections: experts have no dropout there; "
            "create the model with a drop rate of 0"
        )


class FirstLinear(NamedTuple):
    """``mlp.c_fc``, from whose ``weight.dtype`` open_clip's blocks read a tower's type; torch.compile traces it."""

    weight: Any
