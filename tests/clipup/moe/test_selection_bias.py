"""Balance by a selection bias: an unbalanced router becomes balanced, and nothing but the choices changes."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from clipup import SparseMoE
from clipup import update_selection_bias as update

D, E, K, T = 16, 8, 2, 512


def make_layer(kind="sign", rate=0.02, **options):
    torch.manual_seed(0)
    return SparseMoE(D, 8, num_experts=E, top_k=K, selection_bias=kind, selection_bias_rate=rate, **options)


@pytest.mark.parametrize("kind", ["sign", "z_score"])
def test_a_step_moves_the_bias_by_the_rate_times_the_step_of_the_load(kind):
    layer = make_layer(kind, rate=0.125)
    layer(torch.randn(T, D))
    counts = layer.state.last_routing.tokens_per_expert.sum(0).double()
    update(layer)
    missing = counts.mean() - counts
    step = {"sign": missing.sign(), "z_score": missing / counts.std(correction=0)}[kind]
    torch.testing.assert_close(layer.router.selection_bias.double(), 0.125 * step)


def test_selection_bias_counts_each_training_forward_once():
    x = torch.randn(T, D)
    expected = make_layer("z_score")
    expected(x)
    layer = make_layer("z_score")
    with torch.no_grad():
        layer(torch.randn(T, D))
    layer.eval()(torch.randn(T, D))
    checkpoint(layer.train(), x.requires_grad_(), use_reentrant=False).sum().backward()
    for one in (expected, layer):
        update(one)
    assert torch.equal(layer.router.selection_bias, expected.router.selection_bias)
    update(layer)  # nothing ran since
    assert torch.equal(layer.router.selection_bias, expected.router.selection_bias)


def test_cast_layer_keeps_the_bias_in_float32_and_exact():
    layer = make_layer(rate=1e-3)
    with torch.no_grad():
        layer.router.selection_bias.copy_(torch.randn(E))
    exact = layer.router.selection_bias.clone()
    half = copy.deepcopy(layer).bfloat16()
    assert half.router.weight.dtype == torch.bfloat16 and torch.equal(half.router.selection_bias, exact)
    half(torch.randn(T + 1, D, dtype=torch.bfloat16))  # no expert can have the mean load
    half.load_state_dict(half.bfloat16().state_dict() | {"router.selection_bias": exact.bfloat16()}, assign=True)
    update(half)  # in bfloat16 the largest biases would stay
    moved = half.router.selection_bias - exact.bfloat16()
    torch.testing.assert_close(moved.abs(), torch.full((E,), 1e-3), rtol=1e-3, atol=0)
    assert torch.equal(copy.deepcopy(layer).double().router.selection_bias, exact)
