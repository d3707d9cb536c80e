"""Every MLP family: a small model upcycles to the same function, and all of its experts are trained."""

import pytest
import timm
import torch
from tiny_families import (
    HUGGING_FACE,
    TIMM,
    build,
    coca_cfg,
    hugging_face_cfg,
    timm_model,
)

import clipup
from clipup import MoEConfig, aux_loss, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.clip.inputs import random_inputs

CONFIG = MoEConfig.clip_up(num_experts=3, capacity_factor=None)
IMAGE = CONFIG.replace(towers=("image",))


def assert_upcycles_and_every_expert_learns(dense, config, loss):
    """Checks equality at step 0, and that the gradients of every expert are finite and not zero."""
    torch.manual_seed(0)
    sparse = upcycle(dense, config)
    assert step0_difference(dense, sparse) <= 2e-6
    layers = moe_layers(sparse)
    assert layers and not moe_layers(dense)
    for layer in layers.values():
        layer.config = layer.config.replace(top_k=3)
    (loss(sparse) + aux_loss(sparse)).backward()
    for name, layer in layers.items():
        assert layer.router.weight.grad.isfinite().all(), name
        for kind, parameter in layer.named_parameters(recurse=False):
            gradient = parameter.grad.flatten(1)
            assert gradient.isfinite().all() and (gradient.abs().amax(1) > 0).all(), f"{name}.{kind}"
    return sparse


def contrastive(model):
    images, texts = random_inputs(model, 6)
    image, text = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    return torch.nn.functional.cross_entropy(10 * image @ text.T, torch.arange(6))


@pytest.mark.parametrize("name", [*TIMM, "test_convnext"])
def test_timm_model_upcycles(name):
    loss = lambda model: model(random_inputs(model, 6)[0]).square().sum()  # noqa: E731
    assert_upcycles_and_every_expert_learns(timm_model(name), IMAGE, loss)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_text_tower_upcycles(name, tmp_path):
    dense = build(hugging_face_cfg(HUGGING_FACE[name](), tmp_path))
    sparse = assert_upcycles_and_every_expert_learns(dense, CONFIG, contrastive)
    assert sum(layer.startswith("text.transformer.") for layer in moe_layers(sparse)) == 1


def test_coca_upcycles_in_all_towers():
    def loss(model):
        images, texts = random_inputs(model, 6)
        return contrastive(model) + model(images, texts)["logits"].square().mean()

    config = CONFIG.replace(towers=("image", "text", "decoder"))
    sparse = assert_upcycles_and_every_expert_learns(build(coca_cfg()), config, loss)
    assert list(moe_layers(sparse)) == [
        "text.transformer.resblocks.1.mlp",
        "visual.transformer.resblocks.1.mlp",
        "text_decoder.cross_attn.0.mlp",
        "text_decoder.cross_attn.1.mlp",
    ]
    assert len(moe_layers(upcycle(build(coca_cfg()), CONFIG))) == 2  # the decoder is dense by default
    with torch.no_grad():
        sparse.text_decoder.cross_attn[0].mlp.out_bias.mul_(2)
    assert step0_difference(build(coca_cfg()), sparse) > 1e-3


@pytest.mark.parametrize("family", ["Block/GluMlp", "Block/GeGluMlp"])
def test_gated_families_split_into_shards(family):
    dense = timm_model(family)
    sparse = upcycle(dense, IMAGE.replace(num_experts=8, top_k=4, granularity=2))
    assert step0_difference(dense, sparse) <= 1e-6


def test_norm_before_the_projections_is_shared_by_all_experts():
    dense = timm_model("Block/GeGluMlp")
    sparse = upcycle(dense, IMAGE)
    assert list(moe_layers(sparse)) == ["blocks.1.mlp.moe", "blocks.3.mlp.moe"]
    assert torch.equal(sparse.blocks[1].mlp.norm.weight, dense.blocks[1].mlp.norm.weight)
    assert sparse.blocks[1].mlp.norm is not dense.blocks[1].mlp.norm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("test_resnet"), "the image tower .* has no list of transformer blocks"),
        (lambda: timm.create_model("test_convnext2", use_grn=True), "GlobalResponseNormMlp"),
        (lambda: timm.create_model("test_convnext", conv_mlp=True), "Conv2d, expected a plain nn.Linear$"),
        (lambda: build(coca_cfg()).text, "got TextTransformer"),
    ],
)
def test_unsupported_towers_and_blocks_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        upcycle(make(), IMAGE)
    with pytest.raises(TypeError, match="has no decoder tower"):
        upcycle(timm_model("Block/Mlp"), CONFIG.replace(towers=("decoder",)))


@pytest.mark.parametrize("name", ["CoCa", "RobertaLayer"])
def test_other_towers_are_saved_and_loaded(name, tmp_path):
    cfg = coca_cfg() if name == "CoCa" else hugging_face_cfg(HUGGING_FACE[name](), tmp_path / "text")
    sparse = upcycle(build(cfg), CONFIG.replace(towers=("decoder", "image")) if name == "CoCa" else CONFIG)
    save_pretrained(sparse, tmp_path / "model", cfg)
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path / "model"))
    assert loaded.moe_config == sparse.moe_config and list(moe_layers(loaded)) == list(moe_layers(sparse))
    assert step0_difference(sparse, loaded) == 0
