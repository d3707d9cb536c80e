"""accelerate leaves modules as they are that do, or hold, something else than their classes."""

import copy
import functools
import importlib
from contextlib import suppress

import pytest
import torch
import transformers
from tiny_clip import tiny_clip
from tiny_families import timm_model
from torch import nn

import clipup
from clipup.clip.accelerate import for_inference
from clipup.clip.inputs import random_inputs
from clipup.dense.dense_mlp import was_defined_with
from clipup.dense.mlp_readers import FAMILIES
from clipup.dense.prepared import Prepared
from clipup.dense.prepared_attention import ATTENTIONS, PreparedLinear

BLOCK = "Block/Mlp"
PARTS = {"attention": "blocks.0.attn.qkv", "MLP": "blocks.0.mlp", "projection": "blocks.0.mlp.fc1"}


def image_features(model):
    images, _ = random_inputs(model, batch_size=2)
    with torch.inference_mode():
        return model.encode_image(images)


def of_timm(model, seed=0):
    torch.manual_seed(seed)
    with torch.inference_mode():
        return model(torch.randn(2, 3, *model.patch_embed.img_size))


def assert_left(fast, path):
    """The module is not replaced, and neither is one above it; others are."""
    names = path.split(".")
    above = [fast.get_submodule(".".join(names[: end + 1])) for end in range(len(names))]
    assert not any(isinstance(module, Prepared) for module in above)
    assert any(isinstance(module, Prepared) for module in fast.modules())


def test_copies_are_right_where_listing_modules_makes_new_parameters():
    """As PEFT's attention does: a parameter of the copy may then lie where one of the original lay."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tiny_clip().eval()
    if type(model.visual.transformer.resblocks[0].attn) is not nn.MultiheadAttention:
        pytest.skip("PEFT does not know open_clip 4's attention")
    plain = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attn"], r=4)).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(1)
    theirs = image_features(plain)
    for _ in range(12):
        torch.manual_seed(1)
        torch.testing.assert_close(image_features(clipup.accelerate(plain)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("inplace", [True, False])
def test_what_a_module_holds_beside_its_weights_stays(path, inplace):
    model = timm_model(BLOCK).eval()
    model.get_submodule(path).register_buffer("amax", torch.ones(3))  # as calibration does
    theirs, state = of_timm(model), model.state_dict()
    fast = clipup.accelerate(model, inplace)
    assert_left(fast, path)
    assert fast.state_dict().keys() == state.keys()
    fast.load_state_dict(state)
    torch.testing.assert_close(of_timm(fast), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"])
def test_weights_that_are_no_parameters_stay_out_of_the_state_dict(path, part):
    model = timm_model(BLOCK).eval()
    linear = model.get_submodule(path)
    value = getattr(linear, part).detach()
    delattr(linear, part)
    setattr(linear, part, value)
    fast = clipup.accelerate(model)
    assert_left(fast, path)
    assert fast.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(of_timm(fast), of_timm(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["in_proj_bias", "out_proj.bias"])
def test_biases_of_attention_that_are_no_parameters_stay_out_of_the_state_dict(bias):
    model = tiny_clip().eval()
    attention = model.visual.transformer.resblocks[0].attn
    owner, name = attention.get_submodule(bias.rpartition(".")[0]), bias.rpartition(".")[2]
    value = torch.randn_like(getattr(owner, name))
    delattr(owner, name)
    setattr(owner, name, value)
    assert clipup.accelerate(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("path", PARTS.values(), ids=PARTS)
def test_hooks_of_loading_are_called(path):
    model, called = timm_model(BLOCK).eval(), []
    model.get_submodule(path).register_load_state_dict_pre_hook(lambda *_: called.append("before"))
    model.get_submodule(path).register_load_state_dict_post_hook(lambda *_: called.append("after"))
    fast = clipup.accelerate(model)
    fast.load_state_dict(model.state_dict())
    assert called == ["before", "after"]
    assert_left(fast, path)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_hooks_on_attention_whose_projections_alone_are_replaced_go_on(weights):
    """transformers 5 leaves hooks on the attention of a model that was asked for its hidden states."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    called = []
    for module in model.modules():
        if type(module).__name__ == "CLIPAttention":
            module.register_forward_hook(lambda *_: called.append("here"))
    fast = clipup.accelerate(model, weights=weights)
    assert sum(isinstance(module, PreparedLinear) for module in fast.modules()) == 4
    with torch.inference_mode():
        fast(torch.randn(1, 3, 32, 32))
    assert called


PATCHED = {"MLP": "timm.layers.mlp.Mlp", "attention": "torch.nn.MultiheadAttention", "linear": "torch.nn.Linear"}


@pytest.mark.parametrize("name", PATCHED.values(), ids=PATCHED)
def test_classes_with_another_forward_are_left_as_they_are(name, monkeypatch):
    """Tools that record what layers see replace the method of a class."""
    module, _, kind = name.rpartition(".")
    patched = getattr(importlib.import_module(module), kind)
    model = tiny_clip().eval() if kind == "MultiheadAttention" else timm_model(BLOCK).eval()
    before = patched.forward

    def twice(self, *args, **options):
        y = before(self, *args, **options)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y

    monkeypatch.setattr(patched, "forward", twice)
    outputs = image_features if kind == "MultiheadAttention" else of_timm
    torch.manual_seed(0)
    theirs = outputs(model)
    torch.manual_seed(0)
    fast = for_inference(copy.deepcopy(model))  # as it is if nothing can be prepared
    torch.testing.assert_close(outputs(fast), theirs, rtol=1e-4, atol=1e-4)


def test_blocks_whose_class_has_another_attention_keep_theirs(monkeypatch):
    model = tiny_clip().eval()
    block = type(model.visual.transformer.resblocks[0])

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        return self.attn(q_x, q_x, q_x, need_weights=True, attn_mask=attn_mask)[0] * 2

    if type(model.visual.transformer.resblocks[0].attn) is not nn.MultiheadAttention:
        pytest.skip("open_clip 4's attention gives no weights")
    monkeypatch.setattr(block, "attention", attention)
    torch.manual_seed(0)
    theirs = image_features(model)
    torch.manual_seed(0)
    torch.testing.assert_close(image_features(clipup.accelerate(model)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Block/Mlp", "Block/GluMlp"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_mlps_whose_weights_lie_transposed_in_memory_are_computed(name, weights):
    model = timm_model(name).eval()
    linear = model.blocks[1].mlp.fc1
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    theirs, state = of_timm(model), model.state_dict()
    fast = clipup.accelerate(model, inplace=True, weights=weights)
    tolerance = 1e-5 if weights is None else 5e-2
    torch.testing.assert_close(of_timm(fast), theirs, rtol=tolerance, atol=tolerance)
    assert isinstance(fast.blocks[0].mlp, Prepared)
    if weights is None:
        assert all(torch.equal(fast.state_dict()[key], value) for key, value in state.items())
        fast.load_state_dict(state)
        torch.testing.assert_close(of_timm(fast), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"])
def test_weights_of_another_layout_are_left_as_they_are(path):
    model = timm_model(BLOCK).eval()
    linear = model.get_submodule(path)
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)
    fast = clipup.accelerate(model, inplace=True)
    assert_left(fast, path)


def test_a_model_prepared_in_inference_mode_loads_weights_outside_of_it():
    model = timm_model(BLOCK).eval()
    with torch.inference_mode():
        fast = clipup.accelerate(model)
    fast.load_state_dict(model.state_dict())
    torch.testing.assert_close(of_timm(fast), of_timm(model), rtol=1e-5, atol=1e-5)


def reads_the_weights(self, x, *args, **options):
    """Attention that does not call its layers, as timm's EvaAttention."""
    qkv = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def calls_the_parts(self, x, *args, **options):
    """A block that does not call its MLP."""
    x = x + self.attn(self.norm1(x))
    return x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x))))


def disguised(forward, before):
    return functools.wraps(before)(lambda self, *args, **options: forward(self, *args, **options))


OTHERS = {"attention": ("attn", reads_the_weights), "block": (None, calls_the_parts)}


@pytest.mark.parametrize("wraps", [False, True], ids=["plain", "wraps"])
@pytest.mark.parametrize("owner", ["class", "module"])
@pytest.mark.parametrize(("name", "forward"), OTHERS.values(), ids=OTHERS)
def test_what_another_forward_may_read_is_left_as_it_is(name, forward, owner, wraps, monkeypatch):
    model = timm_model(BLOCK).eval()
    other = model.blocks[0].get_submodule(name or "")
    before = type(other).forward
    forward = disguised(forward, before) if wraps else forward
    if owner == "class":
        monkeypatch.setattr(type(other), "forward", forward)
    else:
        other.forward = forward.__get__(other)
    theirs = of_timm(model)
    fast = for_inference(copy.deepcopy(model)) if owner == "class" else clipup.accelerate(model)
    torch.testing.assert_close(of_timm(fast), theirs, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, Prepared) for module in fast.blocks[0].get_submodule(name or "").modules())


def test_decorators_of_the_library_itself_are_no_other_forward():
    """Those of transformers are around the forwards of its blocks, and of some of its attention."""
    found = set()
    for full_name in {*ATTENTIONS, *(block for family in FAMILIES for block in family.blocks)}:
        module, _, name = full_name.rpartition(".")
        with suppress(ImportError, AttributeError):  # of other versions
            found.add(kind := getattr(importlib.import_module(module), name))
            assert was_defined_with(kind, "forward"), full_name
    assert len(found) > 30 and any(hasattr(kind.forward, "__wrapped__") for kind in found)
