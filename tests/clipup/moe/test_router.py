"""The router beyond its definition (``test_layer``): noise, improbable choices, virtual groups, whole models."""

import pytest
import torch
from torch import nn

from clipup import MoEConfig, SparseMoE
from clipup.moe import losses
from clipup.moe.router import Router, expert_choice, weighted_losses

T, D, E, K = 48, 16, 6, 2


def make_router(**options):
    torch.manual_seed(0)
    return Router(D, MoEConfig(**{"num_experts": E, "top_k": K, **options}))


def test_noise_has_the_stated_deviation_and_only_in_training():
    router, x = make_router(router_noise=3.0), torch.randn(200 * T, D)
    noise = router(x).noisy_logits - router(x).logits
    assert noise.std().item() == pytest.approx(3.0 / E, rel=0.02)
    quiet = router.eval()(x)
    assert quiet.noisy_logits is quiet.logits


def test_under_noise_importance_is_of_the_router_without_it_and_load_of_both():
    router = make_router(router_noise=5.0, load_weight=0.5, importance_weight=0.25)
    routing = router(torch.randn(T, D))
    expected = 0.5 * losses.load(routing.logits, routing.noisy_logits, 5.0 / E, K)
    expected += 0.25 * losses.importance(routing.logits.softmax(-1).mean(0))
    torch.testing.assert_close(weighted_losses(routing, router.config), expected)


def test_the_only_gate_is_one_however_improbable_the_choice():
    router = make_router(num_experts=3, normalize_gates="after_drop", eval_capacity_factor=0.5).eval()
    router.logits = lambda x, mask: torch.tensor([[0.0, -300, -104]] * 2 + [[0, -104, -300]] * 2)
    routing = router(torch.zeros(4, D))
    assert (routing.plan.row_of_choice >= 0).tolist() == [[True, True]] * 2 + [[False, True]] * 2
    assert routing.gates.tolist() == [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2
    config = MoEConfig(num_experts=2, top_k=1, routing="expert_choice")
    gating, _ = expert_choice(torch.tensor([[0.0, -104.0], [0.0, -100.0]]), config, 1.0, None)
    assert gating.expert_indices.tolist() == [[0, -1], [1, -1]]
    assert gating.gates.tolist() == [[1.0, 0.0]] * 2


def test_chosen_shards_make_up_the_whole_mlp_for_every_token():
    mlp = nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))
    layer = SparseMoE.from_dense(mlp, MoEConfig(num_experts=24, top_k=12, granularity=6))
    experts = layer.router(torch.randn(500, D)).gating.expert_indices
    shards, groups = (experts % 6).sort(-1).values, (experts // 6).sort(-1).values
    assert torch.equal(shards, torch.arange(6).repeat_interleave(2).expand(500, 12).int())
    assert torch.equal(groups[:, 0], groups[:, 5]) and torch.equal(groups[:, 6], groups[:, 11])
    assert (groups[:, 0] != groups[:, 6]).all() and len(groups[:, 0].unique()) > 1
