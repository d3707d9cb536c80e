import math

import pytest
import torch
from torch import nn

from clipup import SparseMoE, moe_metrics

D, E, K, T = 12, 4, 2, 40


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [SparseMoE(D, 16, num_experts=E, capacity_factor=0.5, balance="top2") for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.router.weight)
    return nn.ModuleDict({"first": layers[0], "block": nn.ModuleDict({"moe": layers[1]})})


def test_layers_that_have_not_run_are_left_out(model):
    assert moe_metrics(model) == {}
    model["first"](torch.randn(T, D))
    assert list(moe_metrics(model)) == ["first"]


@pytest.mark.parametrize("training", [True, False])
def test_metrics_say_what_the_last_forward_did(model, training):
    layer = model["first"].train(training)
    layer(torch.randn(3, D))
    x = torch.randn(2, T // 2, D)
    layer(x)
    metrics = moe_metrics(model)["first"]
    probs = (x.view(T, D) @ layer.router.weight.T).softmax(-1)
    experts = probs.topk(K).indices
    counts = torch.bincount(experts.flatten(), minlength=E)
    assert torch.equal(metrics["expert_indices"].long(), experts)
    torch.testing.assert_close(metrics["load"], counts / (K * T))
    capacity = math.ceil(0.5 * K * T / E)
    dropped = (counts - capacity).clamp_min(0).sum().item() / (K * T) if training else 0
    assert metrics["dropped"].item() == pytest.approx(dropped)
    torch.testing.assert_close(metrics["router_entropy"], -(probs * probs.log()).sum(-1).mean())
    first = torch.bincount(experts[:, 0], minlength=E) / T
    torch.testing.assert_close(metrics["balance"], E * (first * probs.mean(0)).sum())
    torch.testing.assert_close(metrics["z"], (x.view(T, D) @ layer.router.weight.T).logsumexp(-1).square().mean())
