"""``upcycle([model, other, ...])``: experts from several dense models of one architecture."""

import pytest
import torch
from tiny_clip import tiny_clip

from clipup import MoEConfig, moe_layers, step0_difference, upcycle

CONFIG = MoEConfig.clip_up(num_experts=5, capacity_factor=None)


def models(count):
    return [tiny_clip(seed=seed) for seed in range(count)]


def test_expert_e_is_the_mlp_of_model_e_modulo_their_number():
    dense = models(2)
    sparse = upcycle(dense, CONFIG)
    layers = moe_layers(sparse)
    assert len(layers) == 4
    for name, layer in layers.items():
        for expert in range(5):
            mlp = dense[expert % 2].get_submodule(name)
            assert torch.equal(layer.in_weight[expert], mlp.c_fc.weight)
            assert torch.equal(layer.in_bias[expert], mlp.c_fc.bias)
            assert torch.equal(layer.out_weight[expert], mlp.c_proj.weight)
            assert torch.equal(layer.out_bias[expert], mlp.c_proj.bias)
    assert torch.equal(sparse.token_embedding.weight, dense[0].token_embedding.weight)


def test_several_copies_of_one_model_keep_its_function():
    dense = tiny_clip()
    assert step0_difference(dense, upcycle([dense, dense, dense], CONFIG)) <= 2e-6
    assert torch.equal(*(next(iter(moe_layers(upcycle(m, CONFIG)).values())).in_weight for m in ([dense], dense)))


def test_groups_of_shards_come_from_one_model():
    dense = models(2)
    sparse = upcycle(dense, CONFIG.replace(num_experts=6, granularity=2))
    for name, layer in moe_layers(sparse).items():
        for group in range(3):
            mlp = dense[group % 2].get_submodule(name)
            assert torch.equal(torch.cat(list(layer.in_weight[2 * group : 2 * group + 2])), mlp.c_fc.weight)
            assert torch.equal(torch.cat(list(layer.out_weight[2 * group : 2 * group + 2]), 1), mlp.c_proj.weight)


def test_models_of_another_architecture_are_refused_by_name_and_nothing_is_changed():
    first, other = tiny_clip(), tiny_clip("quick_gelu")
    before = {name: value.clone() for name, value in first.state_dict().items()}
    with pytest.raises(ValueError, match="models must be of one architecture"):
        upcycle([first, other], CONFIG, inplace=True)
    assert not moe_layers(first) and all(torch.equal(first.state_dict()[name], value) for name, value in before.items())


def test_an_empty_list_and_sparse_models_are_refused_by_name():
    with pytest.raises(ValueError, match="model is an empty list"):
        upcycle([], CONFIG)
    with pytest.raises(ValueError, match="already sparse"):
        upcycle([tiny_clip(), upcycle(tiny_clip(), CONFIG)], CONFIG)
    with pytest.raises(TypeError, match="model must be"):
        upcycle([tiny_clip(), "ViT-B-32"], CONFIG)
