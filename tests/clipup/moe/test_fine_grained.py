"""Fine-grained experts (arXiv 2410.07524): shards of the dense MLP, in virtual groups that make it up again."""

import pytest
import torch
from tiny_clip import tiny_clip, tiny_config
from tiny_families import timm_model
from torch import nn

from clipup import (
    MoEConfig,
    SparseMoE,
    create_model_and_transforms,
    moe_layers,
    save_pretrained,
    step0_difference,
    upcycle,
)
from clipup.clip.flops import count, count_active
from clipup.dense.mlp_families import read_mlp
from clipup.moe.expert_init import experts_of

D, H = 16, 24
CONFIG = MoEConfig.clip_up(num_experts=16, top_k=8, granularity=4, towers=("image", "text"))


def open_clip_mlp(bias=True):
    torch.manual_seed(0)
    mlp = nn.Sequential()
    for name, part in {"c_fc": nn.Linear(D, H, bias), "gelu": nn.GELU(), "c_proj": nn.Linear(H, D, bias)}.items():
        mlp.add_module(name, part)
    return mlp


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu", "custom_blocks"])
@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": 8}, {"granularity": 2}, {"top_k": 4}, {"shared_expert": True}, {"score_function": "sigmoid"}],
)
def test_upcycled_model_equals_dense_at_step_zero(kind, options):
    dense = tiny_clip(kind)
    sparse = upcycle(dense, CONFIG.replace(**options))
    assert step0_difference(dense, sparse) <= 1e-6


@pytest.mark.parametrize("family", ["Block/SwiGLU", "Block/GluMlp", "Block/GeGluMlp", "ConvNeXtBlock/Mlp"])
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


def test_without_virtual_groups_the_step_zero_equality_is_lost():
    mlp = open_clip_mlp()
    layer = SparseMoE.from_dense(mlp, MoEConfig(num_experts=16, top_k=8, granularity=4))
    x = torch.randn(50, D)
    torch.testing.assert_close(layer(x), mlp(x))
    layer.router.reset_parameters()
    assert (layer(x) - mlp(x)).abs().max() > 0.01


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


def test_router_has_one_row_a_virtual_group():
    sparse = upcycle(tiny_clip(), CONFIG)
    for layer in moe_layers(sparse).values():
        rows = layer.router.weight.unflatten(0, (4, 4))
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert len(rows[:, 0].unique(dim=0)) == 4


def test_cost_is_that_of_whole_experts_but_for_the_router():
    dense = tiny_clip()
    whole = upcycle(dense, MoEConfig.clip_up(num_experts=4, top_k=2))
    fine = upcycle(dense, CONFIG)
    layers = (moe_layers(fine).values(), moe_layers(whole).values())
    for one, other in zip(*layers, strict=True):
        assert one.in_weight.numel() == other.in_weight.numel()
        assert one.d_hidden * 4 == other.d_hidden
    router_flops = sum(2 * 5 * (16 - 4) * 32 for name in moe_layers(fine) if name.startswith("visual"))
    assert count(fine).image_gflops - count(whole).image_gflops == pytest.approx(router_flops / 1e9, rel=1e-3)
    extra_rows = sum(layer.router.weight.numel() for layer in layers[0]) * 3 // 4
    extra_biases = sum((8 - 2) * layer.d_model for layer in layers[0])
    assert count_active(fine) - count_active(whole) == extra_rows + extra_biases


def test_training_parts_the_shards_of_a_group():
    torch.manual_seed(0)
    layer = SparseMoE.from_dense(open_clip_mlp(), MoEConfig(num_experts=8, top_k=4, granularity=2))
    layer(torch.randn(50, D)).square().sum().backward()
    gradient = layer.router.weight.grad.unflatten(0, (4, 2))
    assert (gradient[:, 0] - gradient[:, 1]).abs().max() > 1e-3


def test_saved_model_loads_as_it_was(tmp_path):
    sparse = upcycle(tiny_clip(), CONFIG)
    save_pretrained(sparse, tmp_path, tiny_config())
    loaded, *_ = create_model_and_transforms(str(tmp_path))
    assert loaded.moe_config == CONFIG and step0_difference(sparse, loaded) == 0


def test_mlp_with_a_norm_over_its_hidden_units_is_refused_by_name():
    config = MoEConfig(num_experts=4, granularity=2, towers=("image",))
    with pytest.raises(TypeError, match=r"blocks\.1: granularity is 2, but a norm between .* use granularity=1"):
        upcycle(timm_model("Block/Mlp, normed"), config)


def test_granularity_of_a_layer_cannot_change():
    layer = SparseMoE(D, H)
    with pytest.raises(ValueError, match="config.granularity is 2, but the layer was made with 1; make a new layer"):
        layer.config = layer.config.replace(granularity=2)
