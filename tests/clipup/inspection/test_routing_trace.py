"""Which expert took what, against the router computed by hand; and the model stays as it was."""

import math

import numpy as np
import pytest
import torch
from sparse_clip import CAPTIONS, CHOICES, EXPERTS, dense_clip, sparse_clip, tokenizer
from tiny_clip import tiny_clip
from tiny_families import timm_model

from clipup import MoEConfig, moe_layers, moe_metrics, upcycle
from clipup.inspection import LayerRouting, route_images, route_texts

LAYER = "visual.transformer.resblocks.1.mlp"


@pytest.fixture(scope="module")
def model():
    return sparse_clip()


def images(count, side=16):
    return torch.randn(count, 3, side, side)


def routing(experts, probabilities=None, grid=None):
    """A layer's routing from lists; without probabilities a router that is sure of the first choice."""
    experts = np.array(experts)
    if probabilities is None:
        probabilities = np.eye(int(experts.max()) + 1, dtype=np.float32)[experts[..., 0].clip(0)]
    return LayerRouting("image", experts, np.array(probabilities, dtype=np.float32), experts[..., 0] >= 0, grid)


@pytest.mark.parametrize(("score_function", "batch_size"), [("softmax", 2), ("sigmoid", 32)])
def test_choices_and_probabilities_are_the_routers(score_function, batch_size):
    model, batch = sparse_clip(score_function=score_function), images(5)
    routed = route_images(model, batch, batch_size)
    given = {}
    for name, layer in moe_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
    with torch.no_grad():
        model.encode_image(batch)
    assert list(routed) == list(given) and len(routed) == 2
    for name, x in given.items():
        logits = x.double() @ moe_layers(model)[name].router.weight.double().T
        probabilities = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        torch.testing.assert_close(torch.from_numpy(routed[name].probabilities), probabilities.float())
        assert np.array_equal(routed[name].expert_indices, probabilities.topk(CHOICES).indices.numpy())


@pytest.mark.parametrize("broken", ["conv1.weight", "1.mlp.router.weight", "ln_post.bias"])
def test_a_model_that_gives_nan_is_refused(broken):
    model = sparse_clip()
    with torch.no_grad():
        next(value for name, value in model.visual.named_parameters() if name.endswith(broken)).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        route_images(model, images(2))


def test_padding_of_texts_is_not_traced(model):
    texts = tokenizer()(list(CAPTIONS))
    for layer in route_texts(model, texts, batch_size=2).values():
        assert layer.tower == "text" and layer.grid is None
        assert np.array_equal(layer.expert_indices[..., 0] >= 0, (texts != 0).numpy())
        assert layer.tokens == int((texts != 0).sum())


def test_numbers_of_a_layer_that_can_be_counted_by_hand():
    half = [0.5, 0.5, 0.0]
    layer = routing([[[0, 1], [1, 0], [-1, -1]], [[0, 1], [0, 1], [0, 1]]], [[half, half, [0, 0, 1]], [half] * 3])
    assert layer.tokens == 5
    assert layer.load.tolist() == [0.5, 0.5, 0] and layer.first_load.tolist() == [0.8, 0.2, 0]
    assert layer.token_entropy == pytest.approx(math.log(2)) == layer.mean_entropy
    sure = routing([[[0], [1]]])
    assert sure.token_entropy == 0 and sure.mean_entropy == pytest.approx(math.log(2))


def test_tracing_leaves_the_model_unchanged(model):
    model.train()
    model.visual.transformer.eval()
    model.encode_image(images(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    last = moe_metrics(model)
    route_images(model, images(2))
    route_texts(model, tokenizer()(list(CAPTIONS)))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert moe_metrics(model).keys() == last.keys()
    assert all(torch.equal(moe_metrics(model)[name]["expert_indices"], last[name]["expert_indices"]) for name in last)
    model.eval()


def test_a_patch_on_the_map_is_the_patch_of_the_picture():
    """Without attention a token knows its own patch alone: a changed patch changes the router there and only there."""
    model = upcycle(tiny_clip(), MoEConfig(num_experts=EXPERTS)).eval()
    for block in model.visual.transformer.resblocks:
        torch.nn.init.zeros_(block.attn.out_proj.weight)
    image = images(1)[0]
    changed = image.clone()
    changed[:, 8:, :8] += 1
    layer = route_images(model, [image, changed])[LAYER]
    assert layer.grid == (2, 2) and layer.expert_indices.shape[1] == 5
    difference = np.abs(layer.probabilities[0] - layer.probabilities[1]).max(-1)
    (token,) = np.flatnonzero(difference > 1e-5)  # other tokens may differ by rounding
    assert layer.patch_of(token) == (1, 0)
    assert layer.maps()[1, 1, 0] == layer.expert_indices[1, token, 0]


GRIDS = {"SwinTransformerBlock/Mlp": [(8, 8), (4, 4)], "SwinTransformerV2Block/Mlp": [(8, 8), (4, 4)]}
GRIDS["ConvNeXtBlock/Mlp"] = [(8, 8), (4, 4), (2, 2), (1, 1)]


@pytest.mark.parametrize("name", ["Block/Mlp", *GRIDS])
def test_patches_are_found_in_every_family_of_image_towers(name):
    model = upcycle(timm_model(name), MoEConfig(num_experts=2, towers=("image",)))
    routed = route_images(model, images(2, side=32))
    assert routed and all(layer.grid in GRIDS.get(name, [(4, 4)]) for layer in routed.values())
    assert all(layer.maps().shape == (2, *layer.grid) for layer in routed.values())


def test_strongest_gives_the_most_probable_token_of_each_image():
    layer = routing(
        [[[0], [1], [1]], [[1], [0], [0]], [[1], [1], [1]]],
        [[[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]], [[0, 1], [0.6, 0.4], [0.8, 0.2]], [[0.1, 0.9], [0.2, 0.8], [0.5, 0.5]]],
    )
    assert layer.strongest(0, 5) == [(0, 0), (1, 2)]
    assert layer.strongest(1, 2) == [(1, 0), (2, 0)]
    patches = LayerRouting("image", layer.expert_indices, layer.probabilities, layer.mask, grid=(1, 2))
    assert patches.strongest(0, 5) == [(1, 2)] and patches.patch_of(2) == (0, 1)


def test_a_dense_tower_gives_no_layers_and_what_has_no_experts_or_no_tower_is_refused():
    only_text = upcycle(dense_clip(), MoEConfig(num_experts=2, towers=("text",)))
    assert route_images(only_text, images(1)) == {}
    with pytest.raises(ValueError, match="no sparse layers, so it has no experts to inspect"):
        route_images(dense_clip(), images(1))
    timm = upcycle(timm_model("Block/Mlp"), MoEConfig(num_experts=2, towers=("image",)))
    with pytest.raises(ValueError, match="has no text tower; leave the captions out"):
        route_texts(timm, torch.zeros(1, 4, dtype=torch.long))
