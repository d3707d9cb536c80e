"""accelerate: prepares sparse layers, dense MLPs and attention for inference, and leaves the rest unchanged."""

import copy
import importlib
import os
import pickle
import subprocess
import sys
import types
from abc import ABC
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from open_clip.transformer import ResidualAttentionBlock
from tiny_clip import CONFIGS, tiny_clip
from tiny_families import HUGGING_FACE, TIMM, build, hugging_face_cfg, timm_model
from torch import nn

import clipup
import clipup_kernels
from clipup.clip.inputs import random_inputs
from clipup.clip.towers import tower_blocks
from clipup.dense.dense_mlp import class_name
from clipup.dense.prepared import Prepared
from clipup.dense.prepared_attention import ATTENTION_MODULES, PreparedAttention, PreparedLinear, can_be_prepared
from clipup_kernels.types import PLAIN_LAYOUT


def features(model):
    images, texts = random_inputs(model, batch_size=3)
    return model.encode_image(images), model.encode_text(texts)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_equal_to_rounding(kind):
    model = tiny_clip(kind).eval()
    fast = clipup.accelerate(model)
    replaced = [name for name, module in fast.named_modules() if type(module).__name__ == "PreparedMLP"]
    assert replaced
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = features(model)
        for _ in range(3):
            torch.manual_seed(0)
            assert_close(features(fast), theirs, 1e-5)


def test_dense_mlps_run_on_the_kernels(monkeypatch):
    calls = []
    module = importlib.import_module("clipup.dense.prepared")
    monkeypatch.setattr(module, "dense_mlp", lambda x, *rest: calls.append(x.shape) or torch.zeros_like(x))
    with torch.no_grad():
        features(clipup.accelerate(tiny_clip().eval()))
    assert len(calls) == 8  # 4 blocks in each of two towers


@pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only compiled kernels pack weights")
@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_of_every_block_holds_packed_weights(kind):
    model = tiny_clip(kind).eval()
    fast = clipup.accelerate(model)
    kinds = {name: module for name, module in model.named_modules() if class_name(module) in ATTENTION_MODULES}
    blocks = {name for name, module in kinds.items() if "resblocks" in name and can_be_prepared(module)}
    assert blocks or kind == "custom_blocks"  # open_clip 3 has an attention of its own in these
    for name in kinds:
        assert isinstance(fast.get_submodule(name), PreparedAttention) == (name in blocks), name


LOADED = """
import pickle, sys, torch
fast, texts, theirs = pickle.load(sys.stdin.buffer)
with torch.inference_mode():
    difference = (fast.encode_text(texts) - theirs).abs().max() / theirs.abs().max()
assert difference < 1e-5, difference
"""


def test_a_pickle_is_computed_where_no_kernel_reads_packed_weights():
    model = tiny_clip().eval()
    _, texts = random_inputs(model, batch_size=2)
    with torch.inference_mode():
        content = pickle.dumps((clipup.accelerate(model), texts, model.encode_text(texts)))
    environment = os.environ | {"CLIPUP_BACKEND": "torch_eager"}
    subprocess.run([sys.executable, "-c", LOADED], input=content, env=environment, check=True)


def test_attention_stays_in_torch_where_no_kernel_computes_its_type(monkeypatch):
    model = tiny_clip().eval()
    monkeypatch.setattr(importlib.import_module("clipup.clip.accelerate"), "packed_layout", lambda *_: PLAIN_LAYOUT)
    fast = clipup.accelerate(model)
    assert not any(isinstance(module, PreparedAttention) for module in fast.modules())


class OwnBlock(ResidualAttentionBlock):
    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        y, self.shares = self.attn(q_x, q_x, q_x, need_weights=True, attn_mask=attn_mask)
        return y


def test_blocks_that_ask_for_attention_weights_keep_their_attention():
    """Tools that draw attention replace the method of a block, or its class."""
    model = clipup.upcycle(tiny_clip(), clipup.MoEConfig()).eval()
    first, second, *_ = model.visual.transformer.resblocks
    if type(first.attn) is not nn.MultiheadAttention:
        pytest.skip("open_clip 4's attention gives no weights")
    first.attention = types.MethodType(OwnBlock.attention, first)
    second.__class__ = OwnBlock
    fast = clipup.accelerate(model)
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = features(model)
        torch.manual_seed(0)
        assert_close(features(fast), theirs, 1e-5)
    assert all(block.shares is not None for block in fast.visual.transformer.resblocks[:2])


@pytest.mark.parametrize(
    "change", [prune.identity, nn.utils.parametrizations.weight_norm], ids=["pruned", "parametrized"]
)
def test_attention_with_a_changed_output_projection_keeps_its_names(change):
    model = tiny_clip().eval()
    attention = model.transformer.resblocks[0].attn
    change(attention.out_proj, "weight")
    names = set(model.state_dict())
    assert set(clipup.accelerate(model, inplace=True).state_dict()) == names


def test_attention_beside_an_mlp_that_is_not_prepared_is_left_in_torch(tmp_path):
    model = build(hugging_face_cfg(HUGGING_FACE["BertLayer"](), tmp_path)).eval()
    fast = clipup.accelerate(model)
    assert not any(isinstance(module, Prepared) for module in fast.text.modules())
    _, texts = random_inputs(model, batch_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.encode_text(texts).isfinite().all()


@pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only compiled kernels pack weights")
def test_what_is_read_of_prepared_attention_is_there_or_explained():
    block = clipup.accelerate(tiny_clip().eval()).transformer.resblocks[0]
    assert (block.attn.embed_dim, block.attn.num_heads * block.attn.head_dim) == (32, 32)
    for read in (lambda: block.attn.in_proj_weight, lambda: block.attn.out_proj, lambda: block.mlp.c_proj):
        with pytest.raises(AttributeError, match="of a prepared layer is packed; read it from the plain model, or"):
            read()
    linear = PreparedLinear(nn.Linear(12, 20))
    assert tuple(linear.weight.shape) == (20, 12) and linear.bias.shape == (20,)
    assert PreparedLinear(nn.Linear(12, 20, bias=False)).bias is None


def test_texts_are_computed_up_to_the_end_of_the_longest_text():
    model = tiny_clip().eval()
    fast = clipup.accelerate(model)
    seen = []
    fast.transformer.resblocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    texts = torch.tensor([[5, 7, 63, 0, 0, 0, 0, 0, 0, 0], [5, 7, 8, 9, 63, 0, 0, 0, 0, 0]])
    with torch.inference_mode():
        assert_close([fast.encode_text(texts)], [model.encode_text(texts)], 1e-5)
    assert seen == [5]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_state_dict_equals_that_of_the_plain_model(kind, sparse):
    model = tiny_clip(kind)
    model = clipup.upcycle(model, clipup.MoEConfig()) if sparse else model
    fast = clipup.accelerate(model)
    plain, ours = model.state_dict(), fast.state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_prepared_model_loads_other_weights():
    other = tiny_clip().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    fast = clipup.accelerate(tiny_clip())
    fast.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = features(other)
        torch.manual_seed(0)
        assert_close(features(fast), theirs, 1e-5)


def test_prepared_model_is_for_inference_only():
    fast = clipup.accelerate(tiny_clip().train())
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with pytest.raises(RuntimeError, match="no training mode.*prepare it again"):
        fast.train()
    assert all(not feature.requires_grad for feature in features(fast))  # without no_grad()


def test_model_must_be_cast_before_it_is_prepared():
    model = tiny_clip().eval()
    half = clipup.accelerate(copy.deepcopy(model).to(torch.bfloat16))
    image, _ = random_inputs(model, batch_size=2)
    with torch.inference_mode():
        difference = (half.encode_image(image.bfloat16()).float() - model.encode_image(image)).abs().max()
        assert difference < 0.05 * model.encode_image(image).abs().max()
        fast = clipup.accelerate(model)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="autocast asks for torch.bfloat16"):
            fast.encode_image(image)
    with pytest.raises(RuntimeError, match="of type torch.bfloat16, and cannot become torch.float32"):
        half.float()


def test_sparse_layers_stay_sparse():
    sparse = clipup.upcycle(tiny_clip(), clipup.MoEConfig()).eval()
    fast = clipup.accelerate(sparse)
    assert list(clipup.moe_layers(fast)) == list(clipup.moe_layers(sparse))
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = features(sparse)
        torch.manual_seed(0)
        assert_close(features(fast), theirs, 1e-5)


def test_model_is_copied_unless_inplace():
    model = tiny_clip()
    assert clipup.accelerate(model) is not model
    assert not any(type(module).__name__ == "PreparedMLP" for module in model.modules())
    assert clipup.accelerate(model, inplace=True) is model
    assert any(type(module).__name__ == "PreparedMLP" for module in model.modules())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(3, 3), ValueError, "no sparse layer and no dense MLP to prepare"),
        (None, TypeError, "model must be a torch.nn.Module, got NoneType"),
        ("ViT-B-32", TypeError, "model must be a torch.nn.Module, got str"),
        (clipup.SparseMoE(8, 16, device="meta"), ValueError, "the model is on meta, but it must be on the CPU"),
    ],
    ids=["nothing to prepare", "None", "a name", "another device"],
)
def test_unsupported_models_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        clipup.accelerate(model)


class Doubled(clipup.SparseMoE):
    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


class Scaled(clipup.SparseMoE):
    def gate_scale(self):
        return 3.0


class Mixin:
    def operands(self, dtype):
        return {name: 2 * value for name, value in super().operands(dtype).items() if value is not None}


class Mixed(Mixin, clipup.SparseMoE):
    pass


class More(Scaled):
    def describe(self):
        return "more"


@pytest.mark.parametrize(
    ("kind", "defined"),
    [(Doubled, "forward"), (Scaled, "gate_scale"), (Mixed, "operands"), (More, "describe, gate_scale")],
)
def test_a_layer_that_a_prepared_one_would_not_be_is_refused(kind, defined):
    model = nn.Sequential(nn.Linear(8, 8), kind(8, 16, num_experts=2))

    with pytest.raises(
        TypeError, match=f"1 is a {kind.__name__}, which defines {defined}; a prepared layer is a SparseMoE"
    ):
        clipup.accelerate(model, inplace=True)

    assert type(model[1]) is kind


def test_a_derived_layer_that_only_has_a_constructor_is_prepared():
    class Small(clipup.SparseMoE):
        """Eight wide."""

        def __init__(self):
            super().__init__(8, 16, num_experts=2)

    plain, x = Small().eval(), torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(clipup.accelerate(plain)(x), plain(x))


T = TypeVar("T")


class Named:
    registry: ClassVar[dict] = {}

    def __init_subclass__(cls, key=None, **options):
        cls.registry[key] = cls
        super().__init_subclass__(**options)


class OfAType(Generic[T], clipup.SparseMoE):
    pass


class Abstract(clipup.SparseMoE, ABC):
    width = 8


class Registered(Named, clipup.SparseMoE, key="a layer"):
    """A registry's class."""

    key = "a layer"


def test_a_class_that_python_does_not_let_change_is_refused_and_nothing_changes():
    model = nn.Sequential(clipup.SparseMoE(8, 8, num_experts=2), OfAType(8, 16, num_experts=2))

    with pytest.raises(TypeError, match="1 is a OfAType, which has other bases beside SparseMoE"):
        clipup.accelerate(model, inplace=True)

    assert type(model[0]) is clipup.SparseMoE


@pytest.mark.parametrize("kind", [Abstract, Registered])
def test_what_python_and_registries_add_to_a_class_does_not_matter(kind):
    plain, x = kind(8, 16, num_experts=2).eval(), torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(clipup.accelerate(plain)(x), plain(x))


def test_a_parametrized_layer_is_told_the_way():
    layer = clipup.SparseMoE(8, 16, num_experts=2, shared_expert=True).eval()
    for part in (layer, layer.shared):
        torch.nn.utils.parametrize.register_parametrization(part, "in_weight", nn.Identity())

        with pytest.raises(TypeError, match="in_weight .* is not a plain parameter .*remove_parametrizations"):
            clipup.accelerate(layer)
        torch.nn.utils.parametrize.remove_parametrizations(part, "in_weight")
    clipup.accelerate(layer)


def test_a_shared_expert_that_two_layers_share_is_prepared_once():
    model = nn.Sequential(*(clipup.SparseMoE(16, 32, num_experts=4, shared_expert=True) for _ in range(2))).eval()
    model[1].shared = model[0].shared
    x = torch.randn(7, 16)

    prepared = clipup.accelerate(model)

    assert prepared[1].shared is prepared[0].shared
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
        assert torch.equal(clipup.accelerate(prepared, inplace=True)(x), model(x))


def test_a_shared_expert_of_ones_own_is_refused_and_nothing_changes():
    class Own(nn.Module):
        def forward(self, tokens, mask, dtype, gate):
            return gate * tokens

    layer = clipup.SparseMoE(16, 32, num_experts=4, shared_expert=True).eval()
    layer.shared = Own()

    with pytest.raises(TypeError, match="the shared expert of the layer is a .*Own; only clipup's own SharedExpert"):
        clipup.accelerate(layer, inplace=True)

    assert type(layer) is clipup.SparseMoE


def test_preparing_is_idempotent():
    fast = clipup.accelerate(clipup.upcycle(tiny_clip(), clipup.MoEConfig()))
    again = clipup.accelerate(fast)
    with torch.inference_mode():
        torch.manual_seed(0)
        ours = features(fast)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(features(again), ours, strict=True))


@pytest.mark.parametrize("name", TIMM)
def test_every_family_that_dense_mlp_supports_is_accelerated(name):
    model = timm_model(name).eval()
    if name.endswith("normed"):
        with pytest.raises(ValueError, match="no dense MLP to prepare"):
            clipup.accelerate(model)
        return
    fast = clipup.accelerate(model)
    replaced = [module for module in fast.modules() if type(module).__name__ == "PreparedMLP"]
    assert len(replaced) == len(tower_blocks(model, "image"))
    images, _ = random_inputs(model, 2)
    with torch.inference_mode():
        assert_close([fast(images), fast(images)], [model(images)] * 2, 1e-5)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_towers_are_accelerated_if_their_mlp_is_one_module(name, tmp_path):
    model = build(hugging_face_cfg(HUGGING_FACE[name](), tmp_path)).eval()
    fast = clipup.accelerate(model)
    replaced = [n for n, module in fast.named_modules() if type(module).__name__ == "PreparedMLP"]
    assert sum(n.startswith("text.") for n in replaced) == (2 if name.startswith(("MT5", "ModernBert")) else 0)
    with torch.inference_mode():
        assert_close(features(fast), features(model), 1e-5)


def test_prepared_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="prepared by clipup.accelerate; save the plain model"):
        clipup.save_pretrained(clipup.accelerate(tiny_clip()), tmp_path / "model", {})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("where", ["the MLP", "its projection", "a replaced forward"])
def test_mlp_with_a_hook_or_replaced_forward_is_unchanged(where):
    """Replacing the module would lose its hook or forward."""
    model = tiny_clip().eval()
    block = model.visual.transformer.resblocks[1]
    if where == "a replaced forward":
        block.mlp.c_fc.forward = lambda x: 3 * F.linear(x, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    else:
        module = block.mlp if where == "the MLP" else block.mlp.c_fc
        module.register_forward_hook(lambda module, args, output: 3 * output)
    images, _ = random_inputs(model, batch_size=2)
    with torch.no_grad():
        assert_close(
            [clipup.accelerate(model, inplace=where.endswith("forward")).encode_image(images)],
            [model.encode_image(images)],
            1e-5,
        )
    if where != "a replaced forward":
        with pytest.raises(TypeError, match="resblocks.1: cannot read an MLP with forward hooks.*remove them first"):
            clipup.upcycle(model)


def test_prepared_copy_shares_no_memory_with_the_model(monkeypatch):
    model = tiny_clip().eval()
    model.tied = nn.Linear(32, 128, bias=False)
    model.tied.weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight
    fast = clipup.accelerate(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    ours = {parameter.data_ptr() for parameter in fast.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in model.parameters()}
    assert torch.equal(fast.tied.weight, model.tied.weight)
    glu = timm_model("Block/GeGluMlp").blocks[0].mlp
    assert clipup.accelerate(glu).norm.weight.data_ptr() != glu.norm.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in glu.parameters())


def test_inplace_is_true_or_false():
    with pytest.raises(TypeError, match="inplace must be True or False, got 'no'"):
        clipup.accelerate(tiny_clip(), inplace="no")


def test_pruned_experts_are_refused():
    layer = clipup.SparseMoE(8, 16)
    prune.l1_unstructured(layer, "in_weight", 0.5)
    with pytest.raises(TypeError, match="in_weight of the layer is not a plain parameter.*prune.remove"):
        clipup.accelerate(layer)
