"""Balance by a selection bias: an unbalanced router becomes balanced, and nothing but the choices changes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipup import SparseMoE
from clipup import update_selection_bias as update
from clipup.moe.selection_bias import sign_step, z_score_step

D, E, K, T = 16, 8, 2, 512


def make_layer(kind="sign", rate=0.02, **options):
    torch.manual_seed(0)
    return SparseMoE(D, 8, num_experts=E, top_k=K, selection_bias=kind, selection_bias_rate=rate, **options)


def unbalanced(kind, score_function="softmax"):
    """A layer whose router prefers the low experts for every token, and tokens with a common direction."""
    layer = make_layer(kind, rate=1e-3, score_function=score_function)
    with torch.no_grad():
        layer.router.weight.mul_(10)
        layer.router.weight[:, 0] = torch.linspace(2, -2, E)
    return layer, lambda count: torch.cat([torch.ones(count, 1), torch.randn(count, D - 1)], 1)


def load(layer, x):
    with torch.no_grad():
        layer(x)
    return layer.state.last_routing.tokens_per_expert.sum(0).double()


def excess(layer, x):
    """Largest load over the mean load (MaxVio + 1 of arXiv 2408.15664)."""
    counts = load(layer, x)
    return (counts.max() / counts.mean()).item()


@pytest.mark.parametrize(("kind", "score"), [("sign", "softmax"), ("z_score", "sigmoid")])
def test_an_unbalanced_router_becomes_balanced_on_tokens_it_has_not_seen(kind, score):
    layer, tokens = unbalanced(kind, score)
    fresh = tokens(8 * T)
    before = excess(layer, fresh)
    for _ in range(800):
        layer(tokens(T))
        update(layer)
    assert before > 2.5
    assert excess(layer, fresh) < 1.2
    assert load(layer, fresh).min() > 0.8 * K * len(fresh) / E


def test_sign_step_is_that_of_loss_free_balancing():
    counts = torch.tensor([10.0, 2.0, 6.0, 6.0])
    assert sign_step(counts).tolist() == [-1, 1, 0, 0]


def test_z_score_step_has_mean_zero_and_deviation_one_and_the_sign_of_what_is_missing():
    counts = torch.randint(0, 1000, (E,)).double()
    step = z_score_step(counts)
    assert step.mean().abs() < 1e-12 and step.std(correction=0).item() == pytest.approx(1)
    assert torch.equal(step.sign(), (counts.mean() - counts).sign())
    assert z_score_step(torch.full((E,), 7.0)).tolist() == [0.0] * E


@pytest.mark.parametrize("kind", ["sign", "z_score"])
def test_a_step_moves_the_bias_by_the_rate_times_the_step_of_the_load(kind):
    layer = make_layer(kind, rate=0.125)
    counts = load(layer, x := torch.randn(T, D))
    layer(x)
    update(layer)
    step = {"sign": sign_step, "z_score": z_score_step}[kind](counts)
    torch.testing.assert_close(layer.router.selection_bias.double(), 0.125 * step)


def test_gates_are_the_probabilities_without_the_bias():
    layer = make_layer(normalize_gates="none")
    x = torch.randn(T, D)
    with torch.no_grad():
        layer.router.selection_bias[3] = 10
    routing = layer.router(x)
    probs = (x @ layer.router.weight.T).softmax(-1)
    assert (routing.gating.expert_indices[:, 0] == 3).all()
    torch.testing.assert_close(routing.gates, probs.gather(1, routing.gating.expert_indices.long()))


def test_only_forwards_that_train_count_and_each_once():
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


def test_models_without_a_bias_have_no_buffer_and_are_left_alone():
    layer = SparseMoE(D, 8)
    layer(torch.randn(T, D))
    before = copy.deepcopy(layer.state_dict())
    update(nn.Sequential(layer, nn.Linear(D, D)))
    assert "router.selection_bias" not in before
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_cast_layer_keeps_the_bias_in_float32_and_exact():
    layer = make_layer(rate=1e-3)
    with torch.no_grad():
        layer.router.selection_bias.copy_(torch.randn(E))
    exact = layer.router.selection_bias.clone()
    half = copy.deepcopy(layer).bfloat16()
    assert half.router.weight.dtype == torch.bfloat16 and torch.equal(half.router.selection_bias, exact)
    half(torch.randn(T, D, dtype=torch.bfloat16))
    double = copy.deepcopy(layer).double()
    assert torch.equal(double.router.selection_bias, exact)
    double(torch.randn(T, D, dtype=torch.float64))
    assert layer.to("meta").router.selection_bias.is_meta
