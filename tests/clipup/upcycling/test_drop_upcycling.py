"""Drop-Upcycling (arXiv 2502.19261): which weights are re-initialized, from which distribution, and which are kept."""

import pytest
import torch
from tiny_families import timm_model

from clipup import MoEConfig, SparseMoE, upcycle
from clipup.dense.dense_mlp import DenseMLP
from clipup.dense.expert_init import experts_of, reinitialize_hidden_units

D, H, E, RATIO = 48, 600, 3, 0.5


def dense_mlp(dtype=torch.float32, gated=False, norm=False):
    """A dense MLP whose tensors have different means and deviations, so that re-initialized values reveal theirs."""
    torch.manual_seed(1)
    shapes = {"in_weight": (H, D), "in_bias": (H,), "out_weight": (D, H), "out_bias": (D,)}
    shapes |= {"gate_weight": (H, D), "gate_bias": (H,)} if gated else {}
    shapes |= {"ln_weight": (H,), "ln_bias": (H,)} if norm else {}
    draw = {
        name: (0.2 * i + 0.1 * (i + 1) * torch.randn(size)).to(dtype) for i, (name, size) in enumerate(shapes.items())
    }
    return DenseMLP(activation="gelu", **draw)


def by_unit(name, tensor):
    """A parameter with one row per hidden unit; None if it does not belong to single units."""
    if name in ("in_weight", "in_bias", "gate_weight", "gate_bias"):
        return tensor
    return tensor.T if name == "out_weight" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"gated": True}, {"norm": True}])
def test_only_selected_units_change_and_each_expert_selects_its_own(dtype, kind):
    dense = dense_mlp(dtype, **kind)
    experts = experts_of(dense, E)
    chosen = torch.zeros(E, H).scatter_(1, reinitialize_hidden_units(experts, RATIO), 1).bool()
    assert (chosen.sum(1) == RATIO * H).all()
    both = (chosen[:, None] & chosen).sum(-1)[~torch.eye(E, dtype=torch.bool)]
    assert (both > 0.4 * H * RATIO).all() and (both < 0.6 * H * RATIO).all()  # independent halves share a half
    for name, stacked in experts.items():
        for tensor, mine in zip(stacked, chosen, strict=True):
            original, of_units = dense.parameters()[name], by_unit(name, tensor)
            if of_units is None:
                assert torch.equal(tensor, original), name
                continue
            same = of_units == by_unit(name, original)
            assert same[~mine].all() and same[mine].float().mean() < 0.05, name


def test_new_values_are_normal_with_the_mean_and_deviation_of_the_old_ones():
    dense = dense_mlp(gated=True)
    with torch.no_grad():  # half of the units differ, so a subset has other statistics than the whole matrix
        dense.in_weight[: H // 2] = 5 + 0.01 * torch.randn(H // 2, D)
    experts = experts_of(dense, E)
    units = reinitialize_hidden_units(experts, 0.25)
    for name in ("in_weight", "in_bias", "gate_weight", "gate_bias", "out_weight"):
        for tensor, chosen in zip(experts[name], units, strict=True):
            replaced = by_unit(name, dense.parameters()[name])[chosen]
            new = by_unit(name, tensor)[chosen]
            standard = (new - replaced.mean()) / replaced.std(correction=0)
            count = standard.numel()
            assert standard.mean().abs() < 5 / count**0.5, name
            assert (standard.std() - 1).abs() < 5 / (2 * count) ** 0.5, name
            assert (standard.pow(4).mean() - 3).abs() < 5 * (96 / count) ** 0.5, name  # the normal's fourth moment


@pytest.mark.parametrize(("ratio", "changed"), [(0.0, 0), (1.0, H)])
def test_ratio_zero_changes_no_unit_and_ratio_one_all_but_those_of_the_shared_expert(ratio, changed):
    dense = dense_mlp()
    layer = SparseMoE.from_dense(dense, MoEConfig(num_experts=E, reinit_ratio=ratio, shared_expert=True))
    rows = (layer.in_weight != dense.in_weight).any(-1)
    assert rows.sum(-1).tolist() == [changed] * E
    assert torch.equal(layer.shared.in_weight[0], dense.in_weight)


def test_experts_with_a_norm_and_meta_tensors_are_supported():
    sparse = upcycle(timm_model("Block/Mlp, normed"), MoEConfig(towers=("image",), reinit_ratio=RATIO))
    assert sparse(torch.randn(2, 3, 32, 32)).isfinite().all()
    with torch.device("meta"):
        layer = SparseMoE.from_dense(dense_mlp(), MoEConfig(reinit_ratio=RATIO))
    assert all(parameter.is_meta for parameter in layer.parameters())
