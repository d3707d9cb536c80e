"""Reads dense MLPs: which modules are known to compute ``W_out act(W_in x + b_in) + b_out``, and where the parts are.

A family is matched on the exact classes of the block and of its MLP, by their full names, and never on an attribute's
name: a subclass or a look-alike may compute something else. Matching by name also keeps open_clip and timm out of the
imports of people who use ``SparseMoE`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class DenseMLP:
    """A dense MLP taken apart; its parameters are the originals, not copies."""

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

    def parameters(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in SparseMoE; what the MLP lacks is left out."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Family:
    """Blocks of these classes hold, as ``block.mlp``, an MLP of this class, which ``read`` takes apart."""

    name: str
    blocks: tuple[str, ...]
    mlp: str
    read: Callable[[nn.Module], DenseMLP]


def read_mlp(mlp: nn.Module) -> DenseMLP:
    """Takes a dense MLP apart.

    Raises:
        TypeError: its class is of no family that is read, or a part of it is (a dropout that drops, a norm between the
            projections, an unknown activation); the message names it.
    """
    for family in FAMILIES:
        if _class_name(mlp) == family.mlp:
            return family.read(mlp)
    raise TypeError(f"cannot read {_class_name(mlp)} as an MLP; {families_read()}")


def read_block(block: nn.Module) -> DenseMLP:
    """Takes the MLP of a transformer block apart, which is ``block.mlp`` in every family.

    Raises:
        TypeError: as ``read_mlp``, and where the block's class is of no family.
    """
    for family in FAMILIES:
        if _class_name(block) in family.blocks and _class_name(block.mlp) == family.mlp:
            return family.read(block.mlp)
    mlp = getattr(block, "mlp", None)
    inside = f" with an mlp of class {_class_name(mlp)}" if isinstance(mlp, nn.Module) else ""
    raise TypeError(f"cannot read the MLP of a {_class_name(block)}{inside}; {families_read()}")


def holds_family(block: nn.Module) -> bool:
    """Whether ``block`` is of a family's class and holds an MLP that can be read."""
    try:
        read_block(block)
    except (AttributeError, TypeError):
        return False
    return True


def families_read() -> str:
    """One line that says what is read."""
    return "MLPs that are read: " + "; ".join(family.name for family in FAMILIES)


def _class_name(module: nn.Module) -> str:
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
}


def _activation(module: nn.Module) -> str:
    found = _ACTIVATIONS.get(_class_name(module))
    if found is None:
        known = ", ".join(_ACTIVATIONS)
        raise TypeError(f"cannot read an MLP with activation {_class_name(module)}; activations that are read: {known}")
    return found if isinstance(found, str) else found(module)


def _two_linears(first: nn.Module, activation: nn.Module, second: nn.Module) -> DenseMLP:
    for linear in (first, second):
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"cannot read an MLP whose projection is a {_class_name(linear)}, expected a plain nn.Linear"
            )
    if (first.bias is None) != (second.bias is None):
        raise TypeError("cannot read an MLP with a bias in only one of its projections")
    return DenseMLP(first.weight, second.weight, first.bias, second.bias, _activation(activation))


def _identity(name: str, module: nn.Module) -> None:
    if type(module) is not nn.Identity:
        raise TypeError(f"cannot read an MLP with a {_class_name(module)} ({name}) between its projections")


def _read_open_clip(mlp: nn.Sequential) -> DenseMLP:
    parts = dict(mlp.named_children())
    if list(parts) not in (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"]):
        raise TypeError(
            f"cannot read an nn.Sequential of {', '.join(parts) or 'nothing'} as an MLP, expected c_fc, gelu, c_proj; "
            f"{families_read()}"
        )
    _identity("ln", parts.get("ln", nn.Identity()))
    return _two_linears(parts["c_fc"], parts["gelu"], parts["c_proj"])


def _read_timm(mlp: nn.Module) -> DenseMLP:
    _identity("norm", mlp.norm)
    for name in ("drop1", "drop2"):
        drop = getattr(mlp, name)
        if type(drop) is not nn.Identity and not (type(drop) is nn.Dropout and drop.p == 0):
            raise TypeError(
                f"cannot read a timm Mlp with {name}={drop}: the experts have no dropout; create the model with a "
                "drop rate of 0"
            )
    return _two_linears(mlp.fc1, mlp.act, mlp.fc2)


FAMILIES: tuple[Family, ...] = (
    Family(
        "open_clip's ResidualAttentionBlock and CustomResidualAttentionBlock with Sequential(c_fc, gelu, c_proj)",
        ("open_clip.transformer.ResidualAttentionBlock", "open_clip.transformer.CustomResidualAttentionBlock"),
        "torch.nn.modules.container.Sequential",
        _read_open_clip,
    ),
    Family(
        "timm's Block and EvaBlock with Mlp",
        ("timm.models.vision_transformer.Block", "timm.models.eva.EvaBlock"),
        "timm.layers.mlp.Mlp",
        _read_timm,
    ),
)
"""The families that are read, in the order in which they are tried."""
