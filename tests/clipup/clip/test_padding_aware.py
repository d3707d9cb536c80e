"""Padding-aware towers: which tokens are masked, that features stay, and that a mask belongs to one forward."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from padded_clip import randomise_experts, routed_texts, set_padding_aware, sparse_clip, text_layers, text_tower
from tiny_clip import tiny_clip
from tiny_families import HAS_MODERN_TEXT, HUGGING_FACE, build, coca_cfg, hugging_face_cfg, modern_text_clip

from clipup import MoEConfig, aux_loss, moe_layers, upcycle
from clipup.clip.inputs import random_inputs
from clipup.clip.padding_aware import make_padding_aware, tokens_up_to_pooled

KINDS = ("gelu", "custom_text", "custom_blocks", "eos_pool")
DROPPING = {"capacity_factor": 0.75, "z_weight": 0.1}
DROPLESS = MoEConfig.clip_up(num_experts=4, capacity_factor=None)


def make_texts(model, seed=1, batch_size=6):
    return random_inputs(model, batch_size, seed)[1]


def seeded(encode, texts):
    """The features, with the same random order of the tokens for every call with texts of this size."""
    torch.manual_seed(1)
    return encode(texts)


def step(model, *batches, encode=None):
    """The features and losses of all the batches, and their gradients: one backward after all forwards."""
    model.zero_grad()
    outputs = [seeded(encode or model.encode_text, texts) for texts in batches]
    loss = sum((output * torch.linspace(-1, 1, output.shape[1])).sum() for output in outputs) + aux_loss(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def all_masked(model):
    return all(mask is not None and not mask.all() for mask in routed_texts(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"normalize_gates": "after_drop", "priority": True, "top_k": 1}], ids=str)
def test_features_and_gradients_equal_those_with_padding(kind, options):
    model = sparse_clip(kind, capacity_factor=None, balance_weight=0, z_weight=0, **options)
    texts = make_texts(model)
    found = step(model, texts)
    assert all_masked(model)
    set_padding_aware(model, False)
    assert_equal_steps(step(model, texts), found)
    assert routed_texts(model) == [None, None]


@pytest.mark.parametrize(
    ("kind", "row", "pooled"),
    [
        ("gelu", [63, 5, 7, 0, 0, 0, 0, 0, 0, 0], 0),
        ("gelu", [5, 7, 63, 9, 63, 0, 0, 0, 0, 0], 2),
        ("gelu", [5, 5, 5, 5, 5, 5, 5, 5, 5, 63], 9),
        ("eos_pool", [5, 7, 63, 2, 0, 0, 0, 0, 0, 0], 3),
        ("eos_pool", [5, 2, 63, 2, 63, 0, 0, 0, 0, 0], 1),
        ("eos_pool", [5, 7, 63, 9, 5, 5, 5, 5, 5, 5], 0),
    ],
)
def test_mask_ends_at_the_pooled_position(kind, row, pooled):
    model = sparse_clip(kind)
    full = [5] * 9 + [2 if kind == "eos_pool" else 63]
    model.encode_text(torch.tensor([row, row, full]))
    expected = [position <= pooled for position in range(10)]
    assert all(mask.view(3, 10).tolist() == [expected, expected, [True] * 10] for mask in routed_texts(model))


@pytest.mark.parametrize("kind", ["gelu", "custom_text"])
def test_on_the_cpu_blocks_compute_up_to_the_longest_text(kind):
    model, found = sparse_clip(kind), []
    text_tower(model).transformer.resblocks[2].register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
    texts = torch.tensor([[5, 7, 63, 0, 0, 0, 0, 0, 0, 0], [5, 7, 8, 9, 63, 0, 0, 0, 0, 0]])
    for count in (2, 1):
        model.encode_text(texts[:count])
    text_layers(model)[-1].config = text_layers(model)[-1].config.replace(padding_aware=False)
    model.encode_text(texts)
    assert found == [5, 3, 10]


@pytest.mark.parametrize("kind", ["gelu", "custom_blocks"])
def test_padding_affects_neither_losses_nor_capacity(kind):
    model = sparse_clip(kind, capacity_factor=0.5, z_weight=0.1)
    texts = make_texts(model, batch_size=8)
    masked = tokens_up_to_pooled(texts, "argmax", None)
    others = torch.where(masked, texts, torch.randint(1, 60, texts.shape))

    def run(texts):
        features = seeded(model.encode_text, texts)
        return features, aux_loss(model), *(layer.state.last_routing.offsets.diff() for layer in text_layers(model))

    expected = run(texts)
    torch.testing.assert_close(run(others), expected, rtol=0, atol=0)
    assert all(load.max() == -(-int(masked.sum()) // 4) for load in expected[2:])  # ceil(0.5 * K * tokens / E)
    set_padding_aware(model, False)
    assert not torch.allclose(run(texts)[1], run(others)[1])


NOT_APPLIED = {
    "not causal": ("gelu", {"no_causal_mask": True}),
    "pools the last position": ("custom_text", {"pool_type": "last"}),
    "pools a class token": ("custom_text", {"embed_cls": True}),
    "returns its tokens": ("custom_text", {"output_tokens": True}),
}


@pytest.mark.parametrize("name", [*NOT_APPLIED, "CoCa", next(iter(HUGGING_FACE))])
def test_other_towers_route_every_token(name, tmp_path):
    if name in NOT_APPLIED:
        kind, changes = NOT_APPLIED[name]
        dense = tiny_clip(kind, text_cfg=changes)
    else:
        dense = build(coca_cfg() if name == "CoCa" else hugging_face_cfg(HUGGING_FACE[name](), tmp_path)).eval()
    model = upcycle(dense, DROPLESS)
    texts = make_texts(model)
    found, expected = ((m.text if hasattr(m, "text") else m.encode_text)(texts) for m in (model, dense))
    torch.testing.assert_close(found, expected)
    assert not make_padding_aware(model) and set(routed_texts(model)) == {None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_between_forward_and_backward_use_their_own_masks(kind, checkpointing):
    model = sparse_clip(kind, **DROPPING)
    first, second = make_texts(model, 1), make_texts(model, 2)
    alone = [step(model, texts) for texts in (first, second)]
    text_tower(model).transformer.grad_checkpointing = checkpointing
    expected = sum(loss for loss, _ in alone), {name: alone[0][1][name] + alone[1][1][name] for name in alone[0][1]}
    assert_equal_steps(step(model, first, second), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_called_without_texts_route_every_token_also_after_an_error(kind):
    model = sparse_clip(kind, **DROPPING)
    tower, x = text_tower(model), torch.randn(2, 10, 32)
    expected = step(model, make_texts(model))

    handle = text_layers(model)[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.encode_text(make_texts(model, 2))
    handle.remove()
    tower.transformer(x, attn_mask=tower.attn_mask)
    assert routed_texts(model) == [None, None]
    aux_loss(model)
    assert_equal_steps(step(model, make_texts(model)), expected)


@pytest.mark.parametrize("kind", ["custom_blocks"])
def test_compiled_tower_is_one_graph_that_follows_texts_and_config(kind):
    torch._dynamo.reset()  # compiled towers compute, and draw for, padding up to the full length; priority uses no draw
    model = sparse_clip(kind, **DROPPING, priority=True, blocks=(1,))
    compiled = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    for padding_aware, seed in ((True, 1), (True, 2), (False, 2)):
        set_padding_aware(model, padding_aware)
        expected = step(model, make_texts(model, seed))
        assert_equal_steps(step(model, make_texts(model, seed), encode=compiled), expected)
        assert all_masked(model) is padding_aware


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_padding_aware(kind, duplicate):
    model = sparse_clip(kind, **DROPPING)
    texts = make_texts(model)
    features = seeded(model.encode_text, texts)
    copied = duplicate(model)
    assert torch.equal(seeded(copied.encode_text, texts), features) and all_masked(copied)
    set_padding_aware(copied, False)
    assert torch.equal(seeded(model.encode_text, texts), features)


@torch.inference_mode()
def test_threads_that_share_a_model_do_not_share_masks():
    model = sparse_clip(eval_capacity_factor=0.75).eval()
    batches = [make_texts(model, seed, batch_size=32) for seed in range(8)]
    expected = [model.encode_text(texts) for texts in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(torch.inference_mode()(model.encode_text), batches))
    assert all(torch.equal(features, same) for features, same in zip(found, expected, strict=True))


# ---------------------------------------------------------------- towers that mask their padding themselves


def naflex(**options):
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 8, "reg_tokens": 1}
    return timm.create_model("naflexvit_base_patch16_gap", **sizes, **options).eval()


def images_of_sizes(*sizes, length=12):
    """Patches of images of these sizes (patches down, across), padded to one length."""
    torch.manual_seed(1)
    patches, coord = torch.randn(len(sizes), length, 48), torch.zeros(len(sizes), length, 2, dtype=torch.long)
    valid = torch.zeros(len(sizes), length, dtype=torch.bool)
    for row, (down, across) in enumerate(sizes):
        valid[row, : down * across] = True
        coord[row, : down * across] = torch.cartesian_prod(torch.arange(down), torch.arange(across))
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def masks(model):
    return [layer.state.last_routing.mask for layer in moe_layers(model).values()]


@pytest.mark.parametrize("options", [{}, {"block_fn": "EvaBlock", "rope_type": "axial"}], ids=["ViT", "EVA"])
def test_padding_of_images_is_not_routed_and_features_do_not_change(options):
    dense, inputs = naflex(**options), images_of_sizes((2, 3), (3, 4), (1, 2))
    sparse = upcycle(dense, DROPLESS)
    torch.testing.assert_close(sparse(inputs), dense(inputs))
    features = randomise_experts(sparse)(inputs)
    with_register = torch.nn.functional.pad(inputs["patch_valid"], (1, 0), value=True).flatten()
    assert all(torch.equal(mask, with_register) for mask in masks(sparse))
    set_padding_aware(sparse, False)
    torch.testing.assert_close(sparse(inputs), features)
    assert masks(sparse) == [None, None]
    set_padding_aware(sparse, True)
    sparse(torch.randn(2, 3, 16, 16))  # all of one size
    assert masks(sparse) == [None, None]


TEXT_TOWERS = {
    "causal": {"attention_mode": "causal", "pool_type": "eos"},
    "bidirectional": {"attention_mode": "bidirectional", "pool_type": "mean", "attn_gated": True, "qk_norm": True},
    "registers": {"attention_mode": "causal", "pool_type": "eos", "reg_tokens": 2, "value_residual": True},
}


@pytest.mark.skipif(not HAS_MODERN_TEXT, reason="open_clip 3 has no such tower")
@pytest.mark.parametrize("text_cfg", TEXT_TOWERS.values(), ids=TEXT_TOWERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_of_modern_texts_is_not_routed_and_features_do_not_change(text_cfg, checkpointing):
    dense = modern_text_clip(layers=4, **text_cfg)
    dense.set_grad_checkpointing(checkpointing)
    sparse = upcycle(dense, DROPLESS.replace(balance_weight=0, z_weight=0, towers=("text",)))
    rows = [[5, 7, 2], [9, 8, 7, 6, 5, 2], [4, 2], [3, 0, 3, 9, 2]]
    texts = torch.tensor([row + [0] * (10 - len(row)) for row in rows])
    torch.testing.assert_close(sparse.encode_text(texts), dense.encode_text(texts))
    randomise_experts(sparse)
    found = step(sparse, texts)
    valid = torch.nn.functional.pad(texts[:, :6] != 0, (text_cfg.get("reg_tokens", 0), 0), value=True).flatten()
    assert all(torch.equal(mask, valid) for mask in masks(sparse))  # up to the longest text
    copied = pickle.loads(pickle.dumps(sparse))
    torch.testing.assert_close(copied.encode_text(texts), sparse.encode_text(texts))
    set_padding_aware(sparse, False)
    assert_equal_steps(step(sparse, texts), found)
    assert masks(sparse) == [None, None]
