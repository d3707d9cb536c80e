"""Padding-aware text towers: which tokens are masked, which towers support it, and that features are unchanged."""

import copy
import dataclasses
import json

import open_clip
import pytest
import torch
from padded_clip import randomise_experts, routed_texts, set_padding_aware, sparse_clip, text_layers, text_tower
from tiny_clip import CONFIGS, contrastive_loss, tiny_clip, tiny_config
from tiny_families import HUGGING_FACE, build, coca_cfg, hugging_face_cfg
from torch import nn

import clipup
from clipup import MoEConfig, aux_loss, moe_layers, moe_metrics, upcycle
from clipup.clip.flops import count
from clipup.clip.inputs import random_inputs
from clipup.clip.padding_aware import make_padding_aware, tokens_up_to_pooled


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"normalize_gates": "after_drop"}, {"priority": True}])
def test_features_equal_those_with_padding(kind, training, options):
    model = sparse_clip(kind, capacity_factor=None, **options).train(training)
    texts = random_inputs(model, 6)[1]
    features = model.encode_text(texts)
    assert all(mask is not None and not mask.all() for mask in routed_texts(model))
    set_padding_aware(model, False)
    torch.testing.assert_close(features, model.encode_text(texts))
    assert all(mask is None for mask in routed_texts(model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_equal_those_with_padding(kind):
    model = sparse_clip(kind, capacity_factor=None)
    images, texts = random_inputs(model, 6)
    found = gradients(model, contrastive_loss(model, images, texts))
    set_padding_aware(model, False)
    expected = gradients(model, contrastive_loss(model, images, texts))
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        scale = max(1e-3, expected[name].abs().max().item())
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name


def test_image_tower_and_normalization_are_unchanged():
    model = sparse_clip()
    images, texts = random_inputs(model, 3)
    image_features, text_features, _ = model(images, texts)
    layers = moe_layers(model.visual).values()
    assert layers and all(layer.state.last_routing.mask is None for layer in layers)
    torch.testing.assert_close(text_features.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(nn.functional.normalize(model.encode_text(texts), dim=-1), text_features)


@pytest.mark.skipif(hasattr(open_clip.CLIP, "_encode_text"), reason="the attention of open_clip 4 takes no empty batch")
def test_no_texts_have_no_features():
    model = sparse_clip()
    texts = random_inputs(model, 3)[1]
    assert torch.equal(model.encode_text(texts[:0]), model.encode_text(texts)[:0])


@pytest.mark.parametrize(
    ("kind", "row", "pooled"),
    [
        ("gelu", [63, 5, 7, 0, 0, 0, 0, 0, 0, 0], 0),
        ("gelu", [5, 7, 8, 63, 0, 0, 0, 0, 0, 0], 3),
        ("gelu", [5, 7, 63, 9, 63, 0, 0, 0, 0, 0], 2),
        ("gelu", [5, 5, 5, 5, 5, 5, 5, 5, 5, 63], 9),
        ("gelu", [5, 7, 40, 9, 0, 0, 0, 0, 0, 0], 2),
        ("gelu", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        ("eos_pool", [5, 7, 63, 2, 0, 0, 0, 0, 0, 0], 3),
        ("eos_pool", [5, 2, 63, 2, 63, 0, 0, 0, 0, 0], 1),
        ("eos_pool", [5, 7, 63, 9, 5, 5, 5, 5, 5, 2], 9),
        ("eos_pool", [5, 7, 63, 9, 5, 5, 5, 5, 5, 5], 0),
    ],
)
def test_mask_ends_at_the_pooled_position(kind, row, pooled):
    model = sparse_clip(kind)
    full = [5] * 9 + [2 if kind == "eos_pool" else 63]
    model.encode_text(torch.tensor([row, row, full]))
    expected = [position <= pooled for position in range(10)]
    assert all(mask.view(3, 10).tolist() == [expected, expected, [True] * 10] for mask in routed_texts(model))
    for layer in text_layers(model):
        assert (layer.state.last_routing.expert_indices >= 0).all(-1).tolist() == expected * 2 + [True] * 10


def lengths_computed(model, texts):
    """Numbers of tokens per text that the blocks of the text tower compute."""
    found, blocks = [], text_tower(model).transformer.resblocks
    handles = [block.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1])) for block in blocks]
    model.encode_text(texts)
    for handle in handles:
        handle.remove()
    assert len(found) == len(blocks)
    return set(found)


@pytest.mark.parametrize("kind", ["gelu", "custom_text", "eos_pool"])
def test_on_the_cpu_blocks_compute_up_to_the_longest_text(kind):
    model = sparse_clip(kind)
    end = 2 if kind == "eos_pool" else 63
    texts = torch.tensor([[5, 7, end, 0, 0, 0, 0, 0, 0, 0], [5, 7, 8, 9, end, 0, 0, 0, 0, 0]])

    assert lengths_computed(model, texts) == {5}
    assert lengths_computed(model, texts[:1]) == {3}
    text_layers(model)[-1].config = dataclasses.replace(text_layers(model)[-1].config, padding_aware=False)
    assert lengths_computed(model, texts) == {10}


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns about constants
def test_traced_tower_accepts_longer_texts_than_in_the_trace():
    model = tiny_clip().eval().requires_grad_(False)
    assert make_padding_aware(model)
    short = torch.tensor([[5, 7, 63, 0, 0, 0, 0, 0, 0, 0]])
    long = torch.tensor([[5, 7, 8, 9, 4, 3, 2, 1, 6, 63]])

    traced = torch.jit.trace_module(model, {"encode_text": (short,)})

    torch.testing.assert_close(traced.encode_text(long), model.encode_text(long))


@pytest.mark.parametrize("kind", ["gelu", "eos_pool"])
def test_features_depend_on_exactly_the_unmasked_tokens(kind):
    model = sparse_clip(kind, capacity_factor=None).double()
    texts = random_inputs(model, 5)[1]
    embedded = []

    def keep(module, args, output):
        embedded.append(output.requires_grad_())

    handle = text_tower(model).token_embedding.register_forward_hook(keep)
    model.encode_text(texts).square().sum().backward(inputs=embedded)
    handle.remove()
    reached = embedded[0].grad.abs().sum(-1) > 0
    pool = ("eos", 2) if kind == "eos_pool" else ("argmax", None)
    assert torch.equal(reached, tokens_up_to_pooled(texts, *pool))


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "custom_text", "custom_blocks"])
def test_padding_affects_neither_losses_nor_capacity(kind, priority):
    model = sparse_clip(kind, capacity_factor=0.5, priority=priority, z_weight=0.1)
    texts = random_inputs(model, 8)[1]
    behind = ~tokens_up_to_pooled(texts, "argmax", None)
    others = torch.where(behind, torch.randint(1, 60, texts.shape), texts)

    def run(texts):
        features = model.encode_text(texts)
        offsets = [layer.state.last_routing.offsets.clone() for layer in text_layers(model)]
        return features, aux_loss(model), *offsets

    for one, other in zip(run(texts), run(others), strict=True):
        assert torch.equal(one, other)
    set_padding_aware(model, False)
    assert not torch.allclose(run(texts)[1], run(others)[1])
    assert not torch.allclose(run(texts)[0], run(others)[0])


def test_capacity_counts_only_unmasked_tokens():
    model = sparse_clip(capacity_factor=0.5)
    texts = random_inputs(model, 8)[1]
    model.encode_text(texts)
    tokens = int(tokens_up_to_pooled(texts, "argmax", None).sum())
    capacity = -(-tokens // 4)  # ceil(0.5 * K * tokens / E) with K = 2, E = 4
    for layer in text_layers(model):
        loads = layer.state.last_routing.offsets.diff()
        assert loads.max() == capacity
    for name, values in moe_metrics(model).items():
        assert name.startswith("transformer.") and 0 < values["dropped"] < 1
        assert (values["expert_indices"] >= 0).all(-1).sum() == tokens


NOT_APPLIED = {
    "not causal": ("gelu", {"no_causal_mask": True}),
    "not causal, custom": ("custom_text", {"no_causal_mask": True}),
    "pools the last position": ("gelu", {"pool_type": "last"}),
    "pools the last position, custom": ("custom_text", {"pool_type": "last"}),
    "pools the first position": ("custom_text", {"pool_type": "first"}),
    "does not pool": ("custom_text", {"pool_type": "none"}),
    "pools a class token": ("custom_text", {"embed_cls": True}),
    "returns its tokens": ("custom_text", {"output_tokens": True}),
}


@pytest.mark.parametrize("case", NOT_APPLIED)
def test_other_towers_route_every_token(case):
    kind, changes = NOT_APPLIED[case]
    dense = tiny_clip(kind, text_cfg=changes)
    model = upcycle(dense, MoEConfig.clip_up(num_experts=4, capacity_factor=None))
    classes = [type(module) for module in dense.modules() if not is_mlp(module)]
    assert [type(module) for module in model.modules() if not is_mlp(module)] == classes
    texts = random_inputs(model, 4)[1]
    encode, expected = ((m.text if hasattr(m, "text") else m.encode_text)(texts) for m in (model, dense))
    torch.testing.assert_close(encode, expected)
    assert all(mask is None for mask in routed_texts(model))
    assert not make_padding_aware(model)


@pytest.mark.parametrize("family", ["CoCa", *HUGGING_FACE])
def test_coca_and_hugging_face_towers_route_every_token(family, tmp_path):
    dense = build(coca_cfg() if family == "CoCa" else hugging_face_cfg(HUGGING_FACE[family](), tmp_path))
    model = upcycle(dense, MoEConfig.clip_up(num_experts=4))
    assert not any(type(module).__module__ == "clipup.clip.padding_aware" for module in model.modules())
    model.encode_text(random_inputs(model, 4)[1])
    assert all(mask is None for mask in routed_texts(model))


def test_experts_with_a_norm_support_masks():
    dense = tiny_clip("custom_blocks", text_cfg={"scale_fc": True})
    model = randomise_experts(upcycle(dense, MoEConfig.clip_up(num_experts=4, capacity_factor=None)))
    texts = random_inputs(model, 6)[1]
    features = model.encode_text(texts)
    assert all(
        mask is not None and layer.ln_weight is not None
        for mask, layer in zip(routed_texts(model), text_layers(model), strict=True)
    )
    set_padding_aware(model, False)
    torch.testing.assert_close(features, model.encode_text(texts))


def is_mlp(module):
    return type(module).__module__.startswith(
        ("clipup.moe.layer", "clipup.moe.router", "clipup.upcycling.sparse_blocks")
    ) or isinstance(module, nn.Sequential | nn.Linear | nn.GELU)


def test_towers_with_modified_modules_are_unchanged():
    class Block(open_clip.transformer.ResidualAttentionBlock):
        pass

    class Model(open_clip.CLIP):
        pass

    def block(model):
        model.transformer.resblocks[0].__class__ = Block

    def attention(model):
        model.attn_mask.zero_()

    def one_step_ahead(model):
        model.attn_mask[3, 4] = 0

    def subclass(model):
        model.__class__ = Model

    for change in (block, attention, one_step_ahead, subclass):
        model = tiny_clip()
        change(model)
        upcycle(model, MoEConfig.clip_up(num_experts=4), inplace=True)
        model.encode_text(random_inputs(model, 4)[1])
        assert all(mask is None for mask in routed_texts(model)), change.__name__


@pytest.mark.parametrize(("name", "value"), [("pool_type", "last"), ("output_tokens", True), ("attn_mask", None)])
def test_attributes_assigned_later_are_respected(name, value):
    model = sparse_clip("custom_text", capacity_factor=None)
    texts = random_inputs(model, 4)[1]
    setattr(model.text, name, value)
    output = model.text(texts)
    assert all(mask is None for mask in routed_texts(model))
    plain = copy.deepcopy(model)
    plain.text.__class__ = open_clip.transformer.TextTransformer
    torch.testing.assert_close(output, plain.text(texts))


def test_dense_text_tower_is_unchanged():
    model = upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=4, towers=("image",)))
    assert type(model) is open_clip.CLIP and type(model.transformer) is open_clip.transformer.Transformer


def test_text_tower_of_another_class_is_unchanged():
    model = tiny_clip("custom_text")
    model.text = nn.Embedding(4, 4)
    assert not make_padding_aware(model) and type(model.text) is nn.Embedding


def test_config_is_read_at_every_forward():
    model = upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=4, padding_aware=False))
    texts = random_inputs(model, 4)[1]
    first, second = text_layers(model)

    def masked():
        model.encode_text(texts)
        return [mask is not None for mask in routed_texts(model)]

    assert masked() == [False, False]
    second.config = second.config.replace(padding_aware=True)
    assert masked() == [False, True]
    set_padding_aware(model, True)
    assert masked() == [True, True]
    first.config = first.config.replace(padding_aware=False)
    assert masked() == [False, True]


def test_config_is_saved_and_defaults_apply_to_older_files(tmp_path):
    model = sparse_clip(padding_aware=False)
    clipup.save_pretrained(model, tmp_path, tiny_config())
    path = tmp_path / "open_clip_config.json"
    stored = json.loads(path.read_text())
    assert stored["moe_cfg"].pop("padding_aware") is False
    texts = random_inputs(model, 4)[1]
    for expected in (False, True):
        loaded, *_ = clipup.create_model_and_transforms(str(tmp_path))
        assert loaded.moe_config.padding_aware is expected
        loaded.encode_text(texts)
        assert all((mask is not None) is expected for mask in routed_texts(loaded))
        path.write_text(json.dumps(stored))


def test_counted_flops_include_padding():
    model = sparse_clip()
    without_padding = count(model)
    set_padding_aware(model, False)
    assert count(model) == without_padding


def test_model_on_the_meta_device_becomes_padding_aware():
    with torch.device("meta"):
        dense = open_clip.CLIP(**tiny_config())
    model = upcycle(dense, MoEConfig.clip_up(num_experts=4)).to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.copy_(tiny_clip().attn_mask)
    randomise_experts(model)
    model.encode_text(random_inputs(model, 4)[1])
    assert all(mask is not None for mask in routed_texts(model))
