"""Experts with a norm or a dropout between their projections, against loops over dense copies."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from moe_cases import randn
from torch import nn
from torch.func import functional_call

from clipup import SparseMoE
from clipup.moe.experts import grouped_layer_norm

D, H, E = 12, 20, 4


def loop_over_dense_copies(layer, x):
    """The layer's definition: timm's modules with the weights of one expert after the other."""
    gated = layer.gate_weight is not None
    mlp = (timm.layers.SwiGLU if gated else timm.layers.Mlp)(D, H, norm_layer=timm.layers.LayerNorm, act_layer=nn.SiLU)
    names = {"fc1_x": "in", "fc1_g": "gate"} if gated else {"fc1": "in"}
    routing = layer.router(x)
    y = torch.zeros_like(x)
    for k in range(layer.config.top_k):
        kept = routing.plan.row_of_choice[:, k] >= 0
        for e in range(E):
            rows = (kept & (routing.gating.expert_indices[:, k] == e)).nonzero()[:, 0]
            weights = {
                f"{place}.{kind}": getattr(layer, f"{name}_{kind}")[e]
                for place, name in {**names, "norm": "ln", "fc2": "out"}.items()
                for kind in ("weight", "bias")
            }
            y = y.index_add(0, rows, routing.gates[rows, k, None] * functional_call(mlp, weights, x[rows]))
    return y


def make_layer(gated, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = SparseMoE(
        D, H, num_experts=E, activation="silu", gated=gated, norm="layer", norm_eps=1e-6, dtype=dtype, **options
    )
    with torch.no_grad():
        layer.router.weight.mul_(30)
        layer.ln_weight.add_(0.3 * torch.randn_like(layer.ln_weight))
        layer.ln_bias.add_(0.3 * torch.randn_like(layer.ln_bias))
    return layer


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("tokens", [40, 3, 0])
def test_normed_experts_and_their_gradients_are_those_of_a_loop_over_dense_copies(gated, capacity_factor, tokens):
    layer = make_layer(gated, capacity_factor=capacity_factor)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, D, dtype=torch.float64)
    y, expected = layer(x), loop_over_dense_copies(layer, x)
    torch.testing.assert_close(y, expected)
    inputs = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), tuple(inputs.values()))
    definition = torch.autograd.grad((expected * weights).sum(), tuple(inputs.values()))
    for name, one, other in zip(inputs, found, definition, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_masked_tokens_may_hold_nan():
    layer = make_layer(True, torch.float32)
    x = torch.randn(10, D)
    mask = torch.arange(10) < 6
    x[~mask] = float("nan")
    y = layer(x.requires_grad_(), mask)
    torch.testing.assert_close(y[mask], layer(x[mask]))
    assert y[~mask].abs().sum() == 0
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_dropout_is_drawn_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = SparseMoE(D, H, num_experts=E, dropout=0.5)
    plain = SparseMoE(D, H, num_experts=E)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(7, D)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(torch.stack([layer(x) for _ in range(400)]).mean(0), plain(x), rtol=0, atol=0.1)
    assert torch.equal(layer.eval()(x), plain(x))


def test_a_reset_norm_is_the_identity():
    layer = make_layer(False)
    layer.reset_parameters()
    assert torch.equal(layer.ln_weight, torch.ones_like(layer.ln_weight))
    assert torch.equal(layer.ln_bias, torch.zeros_like(layer.ln_bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_layer_norm_takes_the_weight_of_each_rows_expert(dtype):
    rows, weight, bias = randn(9, H, dtype=dtype), randn(E, H, seed=1), randn(E, H, seed=2)
    offsets = torch.tensor([0, 4, 4, 5, 8], dtype=torch.int32)
    found = grouped_layer_norm(rows, weight, bias, offsets, 1e-3)
    assert found.dtype == dtype
    for e in range(E):
        mine = slice(offsets[e], offsets[e + 1])
        expected = F.layer_norm(rows[mine].float(), (H,), weight[e], bias[e], 1e-3).to(dtype)
        torch.testing.assert_close(found[mine], expected)
