"""accelerate: prepares sparse layers, dense MLPs and attention for inference, plain or int8, and leaves the rest."""

import copy
import operator
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from tiny_clip import CONFIGS, tiny_clip
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
from tiny_hugging_face import tiny_hugging_face
from torch import nn

import clipup
import clipup_kernels
from clipup.clip.hugging_face import random_batch
from clipup.clip.inputs import encoders, random_inputs
from clipup.clip.towers import tower_blocks
from clipup.dense.dense_mlp import class_name
from clipup.inference.prepared import Prepared, PreparedMLP
from clipup.inference.prepared_attention import ATTENTION_MODULES, PreparedAttention, can_be_prepared
from clipup.inference.prepared_linear import PreparedLinear

needs_kernels = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ packs weights")
with_weights = pytest.mark.parametrize("weights", [None, pytest.param("int8", marks=needs_kernels)])


@torch.inference_mode()
def features(model):
    return [encode(batch) for encode, batch in zip(encoders(model).values(), random_inputs(model, 3), strict=False)]


def assert_follows(ours, theirs, weights):
    """Up to rounding, or up to quantization."""
    for output, same in zip(ours, theirs, strict=True):
        if weights is None:
            assert (output - same).abs().max() <= 1e-5 * same.abs().max()
        else:
            assert F.cosine_similarity(output.flatten(1), same.flatten(1)).min() > 0.98


def upcycled(kind="gelu", seed=0):
    return clipup.upcycle(tiny_clip(kind, seed), clipup.MoEConfig()).eval()


def prepared_parts(model, kind=Prepared):
    return [module for module in model.modules() if isinstance(module, kind)]


@with_weights
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_features_and_state_dict_are_those_of_the_plain_model(kind, sparse, weights):
    model = upcycled(kind) if sparse else tiny_clip(kind).train()
    fast = clipup.accelerate(model, weights=weights)
    assert_follows(features(fast), features(model.eval()), weights)
    assert list(clipup.moe_layers(fast)) == list(clipup.moe_layers(model))
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not prepared_parts(model)
    if weights is None:
        plain, ours = model.state_dict(), fast.state_dict()
        assert list(ours) == list(plain) and all(torch.equal(ours[name], plain[name]) for name in plain)
    if clipup_kernels.backend_info()["compiled"]:
        attention = {n: m for n, m in model.named_modules() if class_name(m) in ATTENTION_MODULES and "resbl" in n}
        assert attention or kind == "custom_blocks"  # open_clip 3 has an attention of its own in these
        for name, module in attention.items():
            assert isinstance(fast.get_submodule(name), PreparedAttention) == can_be_prepared(module)


def test_a_model_in_channels_last_keeps_its_state_dict():
    model = tiny_clip().to(memory_format=torch.channels_last)
    fast = clipup.accelerate(model)
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is NaN
    try:
        ours = fast.state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("part", ["attn.in_proj_weight", "attn.out_proj", "mlp.c_fc", "mlp.c_fc.weight", "mlp.c_proj"])
def test_setting_a_part_of_a_prepared_layer_is_refused(part):
    layer, _, name = f"visual.transformer.resblocks.0.{part}".rpartition(".")
    plain, fast = map(operator.attrgetter(layer), (tiny_clip(), clipup.accelerate(tiny_clip())))
    with pytest.raises(AttributeError, match="cannot be set|can't set"):
        setattr(fast, name, getattr(plain, name))


@with_weights
@pytest.mark.parametrize("name", TIMM)
def test_timm_families_are_accelerated(name, weights):
    model = timm_model(name).eval()
    if name.endswith("normed"):
        with pytest.raises(ValueError, match="no dense MLP to prepare"):
            clipup.accelerate(model)
        return
    fast = clipup.accelerate(model, weights=weights)
    assert len(prepared_parts(fast, PreparedMLP)) == len(tower_blocks(model, "image"))
    assert_follows(features(fast), features(model), weights)
    if weights is None:
        torch.testing.assert_close(fast.state_dict(), model.state_dict(), rtol=0, atol=0)


@with_weights
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_towers_are_accelerated(name, weights, tmp_path):
    model = build(hugging_face_cfg(HUGGING_FACE[name](), tmp_path)).eval()
    fast = clipup.accelerate(model, weights=weights)
    assert len(prepared_parts(fast.text, PreparedMLP)) == 2
    assert_follows(features(fast), features(model), weights)


@pytest.mark.skipif(not HAS_MODERN_TEXT, reason="open_clip 3 has no such tower")
def test_dense_blocks_of_a_padding_aware_tower_are_prepared_too():
    model = clipup.upcycle(modern_text_clip().eval(), clipup.MoEConfig(num_experts=2))
    fast = clipup.accelerate(model)
    assert len(prepared_parts(fast.text, PreparedMLP)) == len(model.text.blocks) - 1
    assert_follows(features(fast), features(model), None)


@needs_kernels
@pytest.mark.parametrize("name", ["CLIPModel", "Siglip2Model", "ViTModel", "Dinov2ForImageClassification", "CoCa"])
def test_other_models_are_quantized_with_their_self_attention(name):
    model = build(coca_cfg()).eval() if name == "CoCa" else tiny_hugging_face(name)
    int8 = clipup.accelerate(model, weights="int8")
    assert name == "CoCa" or len(prepared_parts(int8, PreparedLinear)) >= 8
    inputs = {"args": random_inputs(model, 2)} if name == "CoCa" else {"kwargs": random_batch(model, 2)}
    with torch.inference_mode():
        ours, theirs = (form(*inputs.get("args", ()), **inputs.get("kwargs", {})) for form in (int8, model))
    compared = [key for key in ("image_embeds", "text_embeds", "logits") if key in theirs] or [next(iter(theirs))]
    assert_follows([ours[key] for key in compared], [theirs[key] for key in compared], "int8")


@with_weights
def test_copies_pickles_and_threads_compute_the_same(weights):
    prepared = clipup.accelerate(upcycled(), weights=weights)
    expected = features(prepared)
    for same in (
        copy.deepcopy(prepared),
        pickle.loads(pickle.dumps(prepared)),
        clipup.accelerate(prepared, weights=weights),
    ):
        assert all(map(torch.equal, features(same), expected))
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(features, [prepared] * 20):
            assert all(map(torch.equal, found, expected))


LOADED = """
import pickle, sys, torch
fast, texts, theirs = pickle.load(sys.stdin.buffer)
with torch.inference_mode():
    difference = (fast.encode_text(texts) - theirs).abs().max() / theirs.abs().max()
assert difference < 1e-5, difference
"""


@pytest.mark.parametrize(
    "machine",
    [{"CLIPUP_BACKEND": "torch_eager"}, pytest.param({"CLIPUP_CPU_ISA": "portable"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_pickle_is_computed_on_every_cpu(machine):
    model = upcycled()
    _, texts = random_inputs(model, batch_size=2)
    with torch.inference_mode():
        content = pickle.dumps((clipup.accelerate(model), texts, model.encode_text(texts)))
    subprocess.run([sys.executable, "-c", LOADED], input=content, env=os.environ | machine, check=True)


@with_weights
def test_a_model_is_compiled_and_exported(weights):
    model = clipup.accelerate(upcycled(), weights=weights)
    visual, both = model.visual, random_inputs(model, 3)
    images, more = both[0], random_inputs(model, 5)[0]
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(visual, (images,), dynamic_shapes=({0: batch},)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(exported(more), visual(more))
        assert all(map(torch.equal, compiled(*both), model(*both)))


def test_a_model_is_cast_before_it_is_prepared():
    model = tiny_clip().eval()
    half, images = clipup.accelerate(copy.deepcopy(model).bfloat16()), random_inputs(model, 2)[0]
    with torch.inference_mode():
        assert_follows([half.encode_image(images.bfloat16()).float()], [model.encode_image(images)], "bfloat16")
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="prepared in torch.float32"):
            clipup.accelerate(model).encode_image(images)
    with pytest.raises(RuntimeError, match="of type torch.bfloat16, and cannot become torch.float32"):
        half.float()


@needs_kernels
def test_int8_models_hold_their_weights_once_and_no_plain_ones(tmp_path):
    model = upcycled().bfloat16()
    half, int8 = clipup.accelerate(model), clipup.accelerate(model, weights="int8")
    sizes = [sum(b.nbytes for n, b in m.named_buffers() if n.endswith("_packed")) for m in (half, int8)]
    assert sizes[1] < 0.75 * sizes[0]  # tiny layers: scales and padding count
    assert not any(parameter.dim() == 3 for parameter in int8.parameters())
    with pytest.raises(RuntimeError, match="holds int8 weights"):
        int8.state_dict()
    with pytest.raises(ValueError, match="model was prepared by clipup.accelerate"):
        clipup.save_pretrained(half, tmp_path / "model", {})
    with pytest.raises(ValueError, match="prepared with weights='int8' before"):
        clipup.accelerate(int8)


@pytest.mark.parametrize("inplace", [False, True])
def test_model_is_copied_unless_inplace(inplace):
    model = tiny_clip()
    model.tied = nn.Linear(32, 128, bias=False)
    model.tied.weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight
    weights = model.tied.weight.clone()
    fast = clipup.accelerate(model, inplace)
    assert (fast is model) is inplace and bool(prepared_parts(model)) is inplace
    assert torch.equal(fast.tied.weight, weights)
    assert inplace or not {p.data_ptr() for p in fast.parameters()} & {p.data_ptr() for p in model.parameters()}


class Derived(clipup.SparseMoE):
    def gate_scale(self):
        return 3.0


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), {}, ValueError, "no sparse layer and no dense MLP"),
        (lambda: "ViT-B-32", {}, TypeError, "model must be a torch.nn.Module"),
        (lambda: clipup.SparseMoE(8, 16, device="meta"), {}, ValueError, "the model is on meta"),
        (lambda: nn.Sequential(nn.Linear(8, 8), Derived(8, 16)), {}, TypeError, "1 is a Derived"),
        (tiny_clip, {"inplace": "no"}, TypeError, "inplace must be"),
        (tiny_clip, {"weights": "int3"}, ValueError, "weights must be one of int8"),
        (lambda: clipup.SparseMoE(8, 16).double(), {"weights": "int8"}, RuntimeError, "float64"),
    ],
)
def test_wrong_arguments_are_refused_by_name(model, options, error, message):
    with pytest.raises(error, match=message):
        clipup.accelerate(model(), **options)


# ---------------------------------------------------------------- what is left as it is


def replace_forward(module):
    plain = module.forward
    module.forward = lambda *args: 3 * plain(*args)


CHANGES = {
    "a hook": lambda module: module.register_forward_hook(lambda module, args, output: 3 * output),
    "another forward": replace_forward,
    "a buffer": lambda module: module.register_buffer("amax", torch.ones(3)),  # as calibration does
    "a hook of loading": lambda module: module.register_load_state_dict_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", ["attn.qkv", "mlp", "mlp.fc1"])
def test_modules_with_hooks_buffers_or_forwards_of_their_own_are_not_prepared(path, change):
    model = timm_model("Block/Mlp").eval()
    CHANGES[change](model.blocks[0].get_submodule(path))
    theirs = features(model)
    fast = clipup.accelerate(model, inplace=change == "another forward")  # copies of the closure call the original
    names = path.split(".")
    above = [fast.blocks[0].get_submodule(".".join(names[: end + 1])) for end in range(len(names))]
    assert not any(isinstance(module, Prepared) for module in above) and prepared_parts(fast.blocks[1])
    assert_follows(features(fast), theirs, None)


class OwnBlock(ResidualAttentionBlock):
    """Tools that draw attention replace the method of a block, or its class."""

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        y, self.shares = self.attn(q_x, q_x, q_x, need_weights=True, attn_mask=attn_mask)
        return y


@pytest.mark.skipif(HAS_MODERN_TEXT, reason="open_clip 4's attention gives no weights")
def test_blocks_that_ask_for_attention_weights_keep_their_attention():
    model = upcycled()
    model.visual.transformer.resblocks[1].__class__ = OwnBlock  # a sparse one: of others the class would not be read
    fast = clipup.accelerate(model)
    assert_follows(features(fast), features(model), None)
    assert fast.visual.transformer.resblocks[1].shares is not None


@pytest.mark.parametrize("path", ["attn.qkv", "mlp.fc1"])
def test_weights_of_another_order_are_computed(path):
    model = timm_model("Block/Mlp").eval()
    transposed = model.blocks[0].get_submodule(path)
    weight = transposed.weight.detach().clone()
    transposed.weight = nn.Parameter(weight.t().contiguous().t())
    fast = clipup.accelerate(model)
    assert_follows(features(fast), features(model), None)
    assert torch.equal(fast.state_dict()[f"blocks.0.{path}.weight"], weight)


# ---------------------------------------------------------------- all or nothing


@with_weights
@pytest.mark.parametrize("path", ["mlp", "mlp.c_fc", "attn"])
def test_a_module_that_blocks_share_is_prepared_in_place_for_all(path, weights):
    model = tiny_clip()
    first, second = model.visual.transformer.resblocks[:2]
    second.set_submodule(path, first.get_submodule(path))
    theirs = features(model.eval())
    fast = clipup.accelerate(model, inplace=True, weights=weights)
    first, second = fast.visual.transformer.resblocks[:2]
    assert_follows(features(fast), theirs, weights)
    assert all(isinstance(block.mlp, PreparedMLP) for block in (first, second))
    assert path == "mlp.c_fc" or getattr(first, path) is getattr(second, path)


@needs_kernels
def test_a_layer_that_cannot_be_prepared_leaves_the_whole_model_as_it_was():
    wide = clipup.SparseMoE(65_537, 2, num_experts=2)  # more inputs than int8 products can sum
    model = nn.Sequential(clipup.SparseMoE(8, 16), timm_model("Block/Mlp").blocks, wide)
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="2: .*65536 inputs"):
        clipup.accelerate(model, inplace=True, weights="int8")
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def require_each(model):
    for parameter in model.parameters():
        parameter.requires_grad = True


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("require", [nn.Module.requires_grad_, require_each])
def test_a_model_whose_parameters_require_gradients_names_accelerate_and_still_infers(require, sparse):
    fast = clipup.accelerate(upcycled() if sparse else tiny_clip())
    before, inputs = features(fast), random_inputs(fast, 3)
    require(fast)
    for encode, batch in zip(encoders(fast).values(), inputs, strict=True):
        with pytest.raises(NotImplementedError, match=r"clipup\.accelerate"):
            encode(batch)
    assert all(map(torch.equal, features(fast), before))


@pytest.mark.parametrize("path", ["", "visual", "transformer.resblocks.1"])
def test_a_refused_train_leaves_all_modes_as_they_were(path):
    fast = clipup.accelerate(upcycled())
    with pytest.raises(RuntimeError, match="no training mode"):
        fast.get_submodule(path).train()
    assert not any(module.training for module in fast.modules())
