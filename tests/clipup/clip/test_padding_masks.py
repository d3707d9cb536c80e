"""Towers that mask their padding: NaFlexVit, and open_clip 4's ModernTextTransformer. Sparse layers leave it out."""

import copy
import pickle

import pytest
import timm
import torch
from padded_clip import randomise_experts, set_padding_aware
from tiny_families import HAS_MODERN_TEXT, modern_text_clip

from clipup import MoEConfig, aux_loss, moe_layers, upcycle

DROPLESS = {"num_experts": 4, "capacity_factor": None}
TEXT_TOWERS = {
    "causal": {"attention_mode": "causal", "pool_type": "eos"},
    "bidirectional": {"attention_mode": "bidirectional", "pool_type": "eos", "attn_gated": True, "qk_norm": True},
    "mean pooling": {"attention_mode": "bidirectional", "pool_type": "mean"},
    "attention pooling": {"attention_mode": "causal", "pool_type": "map", "norm_placement": "sandwich"},
    "registers": {"attention_mode": "causal", "pool_type": "eos", "reg_tokens": 2, "value_residual": True},
    "ungated": {"attention_mode": "bidirectional", "pool_type": "eos", "mlp_type": "mlp"},
}
only_open_clip_4 = pytest.mark.skipif(not HAS_MODERN_TEXT, reason="open_clip 3 has no such tower")


def naflex(**options):
    torch.manual_seed(0)
    name = "naflexvit_base_patch16_gap"
    return timm.create_model(
        name, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=8, reg_tokens=1, **options
    )


def images_of_sizes(*sizes, length=12):
    """Patches of images of these sizes (patches down, across), padded to one length."""
    torch.manual_seed(1)
    patches, coord = torch.randn(len(sizes), length, 48), torch.zeros(len(sizes), length, 2, dtype=torch.long)
    valid = torch.zeros(len(sizes), length, dtype=torch.bool)
    for row, (down, across) in enumerate(sizes):
        count = down * across
        valid[row, :count] = True
        coord[row, :count] = torch.cartesian_prod(torch.arange(down), torch.arange(across))
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def texts():
    rows = [[5, 7, 2], [9, 8, 7, 6, 5, 2], [4, 2], [3, 9, 3, 9, 2]]
    return torch.tensor([row + [0] * (10 - len(row)) for row in rows])


def masks(layers):
    return [layer.state.last_routing.mask for layer in layers]


IMAGE_TOWERS = {"blocks of ViT": {}, "blocks of EVA": {"block_fn": "EvaBlock", "rope_type": "axial"}}


@pytest.mark.parametrize("options", IMAGE_TOWERS.values(), ids=IMAGE_TOWERS)
def test_padding_of_images_is_not_routed_and_features_do_not_change(options):
    dense = naflex(**options).eval()
    inputs = images_of_sizes((2, 3), (3, 4), (1, 2))
    sparse = upcycle(dense, MoEConfig.clip_up(towers=("image",), **DROPLESS))
    torch.testing.assert_close(sparse(inputs), dense(inputs))

    randomise_experts(sparse)
    features = sparse(inputs)
    layers = moe_layers(sparse).values()
    with_register = torch.nn.functional.pad(inputs["patch_valid"], (1, 0), value=True)
    assert len(layers) == 2 and all(torch.equal(mask, with_register.flatten()) for mask in masks(layers))

    set_padding_aware(sparse, False)
    torch.testing.assert_close(sparse(inputs), features)
    assert masks(layers) == [None, None]


def test_padding_of_images_takes_no_capacity_and_counts_in_no_loss():
    sparse = randomise_experts(
        upcycle(naflex(), MoEConfig.clip_up(towers=("image",), num_experts=4, capacity_factor=0.75, z_weight=0.1))
    )
    inputs = images_of_sizes((2, 3), (3, 4), (1, 2))
    other = {**inputs, "patches": torch.where(inputs["patch_valid"][..., None], inputs["patches"], 9.0)}

    def run(inputs):
        return sparse(inputs), aux_loss(sparse)

    for one, same in zip(run(inputs), run(other), strict=True):
        assert torch.equal(one, same)
    set_padding_aware(sparse, False)
    assert not torch.allclose(run(inputs)[1], run(other)[1])


def test_images_of_one_size_have_no_mask():
    sparse = upcycle(naflex().eval(), MoEConfig.clip_up(towers=("image",), **DROPLESS))

    sparse(torch.randn(2, 3, 16, 16))

    assert masks(moe_layers(sparse).values()) == [None, None]


def test_a_tower_with_blocks_of_another_class_is_left_alone():
    class Other(timm.models.vision_transformer.Block):
        pass

    dense = naflex()
    dense.blocks[0].__class__ = Other
    assert (
        type(upcycle(dense, MoEConfig.clip_up(towers=("image",), **DROPLESS)).blocks[1])
        is timm.models.vision_transformer.Block
    )


@only_open_clip_4
@pytest.mark.parametrize("text_cfg", TEXT_TOWERS.values(), ids=TEXT_TOWERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_of_texts_is_not_routed_and_features_do_not_change(text_cfg, checkpointing):
    dense = modern_text_clip(layers=4, **text_cfg)
    dense.set_grad_checkpointing(checkpointing)
    sparse = upcycle(dense, MoEConfig.clip_up(**DROPLESS))
    torch.testing.assert_close(sparse.encode_text(texts()), dense.encode_text(texts()))

    randomise_experts(sparse)
    features = sparse.encode_text(texts())
    layers = moe_layers(sparse.text).values()
    registers = text_cfg.get("reg_tokens", 0)
    valid = torch.nn.functional.pad(texts()[:, :6] != 0, (registers, 0), value=True)
    assert len(layers) == 2 and all(
        torch.equal(mask, valid.flatten()) for mask in masks(layers)
    )  # up to the longest text

    features.sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in sparse.text.named_parameters()}
    sparse.zero_grad()
    set_padding_aware(sparse, False)
    plain = sparse.encode_text(texts())
    torch.testing.assert_close(plain, features)
    assert masks(layers) == [None, None]
    plain.sum().backward()
    for name, parameter in sparse.text.named_parameters():
        assert (parameter.grad - found[name]).abs().max() <= 1e-5 * max(1, found[name].abs().max()), name


@only_open_clip_4
def test_a_text_with_padding_inside_is_not_cut_at_the_number_of_its_tokens():
    dense = modern_text_clip(layers=4, attention_mode="bidirectional", pool_type="mean")
    sparse = upcycle(dense, MoEConfig.clip_up(**DROPLESS))
    inside = torch.tensor([[5, 0, 7, 0, 0, 9, 2, 0, 0, 0], [4, 3, 2, 0, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(sparse.encode_text(inside), dense.encode_text(inside))


@only_open_clip_4
def test_copies_and_state_dicts_are_those_of_the_tower():
    dense = modern_text_clip(layers=4)
    sparse = upcycle(dense, MoEConfig.clip_up(**DROPLESS)).eval()
    features = sparse.encode_text(texts())
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other.encode_text(texts()), features)
    attention = [name for name in dense.state_dict() if ".attn." in name]
    assert attention and set(attention) <= set(sparse.state_dict())


@only_open_clip_4
def test_squared_relu_is_refused_by_name():
    with pytest.raises(TypeError, match="activation open_clip.transformer.ReLUSquared"):
        upcycle(modern_text_clip(layers=4, mlp_type="relu2"), MoEConfig.clip_up())
