"""``DenseMLP``: the tensors of any MLP, checked before a layer is made of them."""

import pytest
import torch
from torch import nn

import clipup
from clipup.dense.dense_mlp import DenseMLP

PARTS = {"in_weight": (6, 4), "out_weight": (4, 6), "gate_weight": (6, 4)}
PARTS |= {"in_bias": (6,), "out_bias": (4,), "gate_bias": (6,)}


def test_an_mlp_of_ones_own_becomes_experts_that_compute_it():
    mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    dense = DenseMLP(mlp[0].weight, mlp[2].weight, mlp[0].bias, mlp[2].bias, activation="gelu")
    layer, x = clipup.SparseMoE.from_dense(dense, clipup.MoEConfig(num_experts=4)).eval(), torch.randn(5, 8)

    with torch.no_grad():
        torch.testing.assert_close(layer(x), mlp(x))
    assert all(parameter.device.type == "cpu" for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_bias": None}, "a bias in only some of its projections"),
        ({"ln_weight": torch.ones(6)}, "a layer norm that lacks weight or bias"),
        ({"activation": "tanh"}, "activation 'tanh', expected one of gelu, "),
        ({"out_weight": torch.zeros(5, 6), "out_bias": torch.zeros(5)}, "out_weight"),
        ({"out_weight": torch.zeros(6, 4)}, r"whose out_weight has shape \[6, 4\], not \[4, 6\]"),
        ({"gate_weight": torch.zeros(7, 4)}, r"whose gate_weight has shape \[7, 4\], not \[6, 4\]"),
        ({"ln_weight": torch.ones(4), "ln_bias": torch.ones(4)}, r"whose ln_weight has shape \[4\], not \[6\]"),
        ({"in_weight": torch.zeros(6, 4).half()}, "several types or devices"),
        ({"in_bias": torch.zeros(6, device="meta")}, "several types or devices"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_a_layer_is_made(changes, message):
    with pytest.raises(TypeError, match=message):
        DenseMLP(**{"activation": "gelu", **{name: torch.randn(size) for name, size in PARTS.items()}, **changes})


def test_unknown_mlps_are_refused_with_what_to_pass():
    with pytest.raises(TypeError, match="cannot read .*Linear as an MLP; .*takes the tensors as a DenseMLP"):
        clipup.SparseMoE.from_dense(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="cannot read nothing as an MLP"):
        clipup.SparseMoE.from_dense(())
