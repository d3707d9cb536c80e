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
from clipup.dense.expert_init import experts_of
from clipup.dense.mlp_families import read_mlp

D, H = 16, 24
CONFIG = MoEConfig.clip_up(num_experts=16, top_k=8, granularity=4, towers=("image", "text"))


def open_clip_mlp(bias=True):
    torch.manual_seed(0)
    mlp = nn.Sequential()
    for name, part in {"c_fc": nn.Linear(D, H, bias), "gelu": nn.GELU(), "c_proj": nn.Linear(H, D, bias)}.items():
        mlp.add_module(name, part)
    return mlp


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
    layer = SparseMoE.from_dense(open_clip_mlp(), MoEConfig(num_experts=24, top_k=12, granularity=6))
    routing = layer.router(torch.randn(500, D))
    shards = (routing.gating.expert_indices % 6).sort(-1).values
    groups = (routing.gating.expert_indices // 6).sort(-1).values
    assert torch.equal(shards, torch.arange(6).repeat_interleave(2).expand(500, 12).int())
    assert torch.equal(groups[:, 0], groups[:, 5]) and torch.equal(groups[:, 6], groups[:, 11])
    assert (groups[:, 0] != groups[:, 6]).all()
    assert len(groups[:, 0].unique()) > 1


@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_the_dense_weights_of_their_hidden_units_to_the_bit(bias):
    mlp = open_clip_mlp(bias)
    experts = experts_of(read_mlp(mlp), num_experts=6, granularity=3)
    width = H // 3
    for expert in range(6):
        units = slice(width * (expert % 3), width * (expert % 3 + 1))
        assert torch.equal(experts["in_weight"][expert], mlp.c_fc.weight[units])
        assert torch.equal(experts["out_weight"][expert], mlp.c_proj.weight[:, units])
        if bias:
            assert torch.equal(experts["in_bias"][expert], mlp.c_fc.bias[units])
            torch.testing.assert_close(experts["out_bias"][expert] * 3, mlp.c_proj.bias)


def test_mlp_with_a_norm_over_its_hidden_units_is_refused_by_name():
    config = MoEConfig(num_experts=4, granularity=2, towers=("image",))
    with pytest.raises(TypeError, match=r"blocks\.1: granularity is 2, but a norm between .* use granularity=1"):
        upcycle(timm_model("Block/Mlp, normed"), config)
