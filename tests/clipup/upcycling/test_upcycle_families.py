"""Every MLP family: a small model upcycles to the same function, and all of its experts are trained."""

import pytest
import timm
import torch
from tiny_families import (
    HAS_MODERN_TEXT,
    HUGGING_FACE,
    TIMM,
    build,
    coca_cfg,
    hugging_face_cfg,
    modern_text_clip,
    timm_model,
)
from tiny_hugging_face import CONFIGS as MODELS
from tiny_hugging_face import tiny_hugging_face

import clipup
from clipup import MoEConfig, aux_loss, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.clip.hugging_face import hugging_face_blocks
from clipup.clip.inputs import random_inputs
from clipup.clip.towers import tower_blocks
from clipup.dense.mlp_families import find_mlp
from clipup.dense.mlp_readers import FAMILIES

CONFIG = MoEConfig.clip_up(num_experts=3, capacity_factor=None)
IMAGE = CONFIG.replace(towers=("image",))
SMALL = ["test_convnext"]


def assert_upcycles_and_every_expert_learns(dense, config, loss):
    """Checks equality at step 0, then one training step with finite, nonzero gradients in every expert."""
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
    before = {name: layer.in_weight.detach().clone() for name, layer in layers.items()}
    torch.optim.SGD(sparse.parameters(), lr=0.1).step()
    for name, layer in layers.items():
        assert (layer.in_weight != before[name]).flatten(1).any(1).all(), name
    return sparse


def contrastive(model):
    images, texts = random_inputs(model, 6)
    image, text = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    return torch.nn.functional.cross_entropy(10 * image @ text.T, torch.arange(6))


def regression(model):
    return model(random_inputs(model, 6)[0]).square().sum()


@pytest.mark.parametrize("name", [*TIMM, *SMALL])
def test_timm_model_upcycles(name):
    assert_upcycles_and_every_expert_learns(timm_model(name), IMAGE, regression)


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


def test_step_zero_check_covers_the_decoder():
    dense = build(coca_cfg())
    sparse = upcycle(dense, CONFIG.replace(towers=("decoder",)))
    with torch.no_grad():
        sparse.text_decoder.cross_attn[0].mlp.out_bias.mul_(2)
    assert step0_difference(dense, sparse) > 1e-3


OF_OTHER_VERSIONS = ("open_clip.transformer.SwiGLU",)
"""MLPs of open_clip 4."""
ALONE = ("DecoderLayer", "EncoderBlock")
"""Blocks of models that are not upcycled; ``SparseMoE.from_dense`` reads their MLPs."""


def transformer_blocks(model):
    return [block for blocks in hugging_face_blocks(model).values() for block in blocks.values()]


def test_every_family_is_tested_with_a_small_model(tmp_path):
    seen = {find_mlp(block).family for name in TIMM for block in tower_blocks(timm_model(name), "image").values()}
    for name, config in HUGGING_FACE.items():
        model = build(hugging_face_cfg(config(), tmp_path / name.replace("/", "-")))
        seen |= {find_mlp(block).family for tower in ("image", "text") for block in tower_blocks(model, tower).values()}
    if HAS_MODERN_TEXT:
        seen |= {find_mlp(block).family for block in tower_blocks(modern_text_clip(), "text").values()}
    seen |= {find_mlp(block).family for name in MODELS for block in transformer_blocks(tiny_hugging_face(name))}
    not_here = {family for family in FAMILIES if family.parts[0][1].endswith(OF_OTHER_VERSIONS)}
    assert seen | not_here | {family for family in FAMILIES if family.blocks[0].endswith(ALONE)} == set(FAMILIES)
    blocks = {type(block).__name__ for name in TIMM for block in tower_blocks(timm_model(name), "image").values()}
    read = {name.rsplit(".")[-1] for family in FAMILIES for name in family.blocks if name.startswith("timm")}
    assert blocks == read


def test_blocks_of_all_stages_are_numbered_consecutively():
    sparse = upcycle(timm_model("ConvNeXtBlock/Mlp"), IMAGE)
    assert list(moe_layers(sparse)) == ["stages.1.blocks.0.mlp", "stages.2.blocks.0.mlp"]
    sparse = upcycle(timm_model("SwinTransformerBlock/Mlp"), IMAGE.replace(blocks=(-1, 0)))
    assert list(moe_layers(sparse)) == ["layers.0.blocks.0.mlp", "layers.1.blocks.1.mlp"]


def test_norm_before_the_projections_is_shared_by_all_experts():
    dense = timm_model("Block/GeGluMlp")
    sparse = upcycle(dense, IMAGE)
    assert list(moe_layers(sparse)) == ["blocks.1.mlp.moe", "blocks.3.mlp.moe"]
    assert torch.equal(sparse.blocks[1].mlp.norm.weight, dense.blocks[1].mlp.norm.weight)
    assert sparse.blocks[1].mlp.norm is not dense.blocks[1].mlp.norm


@pytest.mark.parametrize("name", ["RobertaLayer"])
def test_hugging_face_towers_are_saved_and_loaded(name, tmp_path):
    cfg = hugging_face_cfg(HUGGING_FACE[name](), tmp_path / "text")
    sparse = upcycle(build(cfg), CONFIG)
    assert_round_trip(sparse, tmp_path / "model", cfg)


def test_coca_is_saved_and_loaded(tmp_path):
    assert_round_trip(upcycle(build(coca_cfg()), CONFIG.replace(towers=("decoder", "image"))), tmp_path, coca_cfg())


def assert_round_trip(sparse, directory, cfg):
    save_pretrained(sparse, directory, cfg)
    loaded, *_ = clipup.create_model_and_transforms(str(directory))
    assert loaded.moe_config == sparse.moe_config and list(moe_layers(loaded)) == list(moe_layers(sparse))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sparse.state_dict().items())
    assert step0_difference(sparse, loaded) == 0


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
