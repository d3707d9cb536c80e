"""Fine-grained experts (arXiv 2410.07524): shards of the dense MLP, in virtual groups that make it up again."""

import pytest
import torch
from tiny_clip import tiny_clip
from tiny_families import timm_model
from torch import nn

from clipup import (
    MoEConfig,
    SparseMoE,
    step0_difference,
    upcycle,
)

D, H = 16, 24
CONFIG = MoEConfig.clip_up(num_experts=16, top_k=8, granularity=4, towers=("image", "text"))


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": 8}, {"granularity": 2}, {"top_k": 4}, {"shared_expert": True}, {"score_function": "sigmoid"}],
)
def test_upcycled_model_equals_dense_at_step_zero(options):
    dense = tiny_clip("custom_blocks")
    sparse = upcycle(dense, CONFIG.replace(**options))
    assert step0_difference(dense, sparse) <= 1e-6


@pytest.mark.parametrize("family", ["Block/GluMlp", "Block/GeGluMlp"])
def test_gated_families_split_too(family):
    dense = timm_model(family)
    sparse = upcycle(dense, MoEConfig(num_experts=8, top_k=4, granularity=2, towers=("image",)))
    assert step0_difference(dense, sparse, images=torch.randn(3, 3, 32, 32)) <= 1e-6


def test_chosen_shards_make_up_the_whole_mlp_for_every_token():
    mlp = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
    layer = SparseMoE.from_dense(mlp, MoEConfig(num_experts=24, top_k=12, granularity=6))
    routing = layer.router(torch.randn(500, D))
    shards = (routing.gating.expert_indices % 6).sort(-1).values
    groups = (routing.gating.expert_indices // 6).sort(-1).values
    assert torch.equal(shards, torch.arange(6).repeat_interleave(2).expand(500, 12).int())
    assert torch.equal(groups[:, 0], groups[:, 5]) and torch.equal(groups[:, 6], groups[:, 11])
    assert (groups[:, 0] != groups[:, 6]).all()
    assert len(groups[:, 0].unique()) > 1
