"""accelerate(model, weights="int8"): experts, MLPs and attention of both towers in int8, close to the plain model.

What concerns attention holds for packed weights of the model's own type too.
"""

import copy
import gc
import importlib
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from open_clip_4 import only_open_clip_4
from tiny_clip import CONFIGS, tiny_clip
from tiny_families import HUGGING_FACE, TIMM, build, coca_cfg, hugging_face_cfg, timm_model
from tiny_hugging_face import CONFIGS as TRANSFORMERS
from tiny_hugging_face import tiny_hugging_face
from torch import nn

import clipup
import clipup_kernels
from clipup.clip.hugging_face import random_batch
from clipup.clip.inputs import random_inputs
from clipup.dense.prepared import Prepared
from clipup.dense.prepared_attention import PreparedAttention, PreparedLinear

pytestmark = pytest.mark.skipif(
    not clipup_kernels.backend_info()["compiled"], reason="int8 needs the compiled extension"
)


def features(model, seed=0):
    torch.manual_seed(seed)
    images, texts = random_inputs(model, batch_size=3)
    with torch.inference_mode():
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        return model.encode_image(images.to(dtype)), model.encode_text(texts)


def cosines(ours, theirs):
    return torch.stack([F.cosine_similarity(a.float(), b.float()).min() for a, b in zip(ours, theirs, strict=True)])


def sparse_clip(kind=None):
    torch.manual_seed(0)
    model = tiny_clip(*([] if kind is None else [kind]))
    return clipup.upcycle(model, clipup.MoEConfig()).eval()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_features_keep_their_direction(kind, sparse):
    torch.manual_seed(0)
    model = (sparse_clip(kind) if sparse else tiny_clip(kind)).eval()
    int8 = clipup.accelerate(model, weights="int8")
    quantized = [module for module in int8.modules() if isinstance(module, Prepared)]
    assert quantized and all(module.quantize == "int8" for module in quantized)
    assert (cosines(features(int8), features(model)) > 0.995).all()


def test_every_block_of_both_towers_is_quantized():
    int8 = clipup.accelerate(sparse_clip(), weights="int8")
    for blocks in (int8.visual.transformer.resblocks, int8.transformer.resblocks):
        for block in blocks:
            assert isinstance(block.attn, PreparedAttention) and isinstance(block.mlp, Prepared)


def test_there_is_one_copy_of_the_weights_half_as_large_as_in_bfloat16():
    model = sparse_clip().to(torch.bfloat16)
    sizes = []
    for weights in (None, "int8"):
        gc.collect()
        before = clipup_kernels.backend_info()["used_memory_bytes"]
        prepared = clipup.accelerate(model, weights=weights)
        packed = {
            name: b.nbytes for name, b in prepared.named_buffers() if name.endswith("_packed") and ".attn." not in name
        }
        used = clipup_kernels.backend_info()["used_memory_bytes"] - before
        sizes.append(sum(packed.values()))
        kept_by_torch = weights is None and clipup_kernels.packed_layout(torch.bfloat16) == "plain"  # as with AMX
        assert used >= (0 if kept_by_torch else sizes[-1])
        del prepared
    assert not any(p.dim() == 3 for p in clipup.accelerate(model, weights="int8").parameters())
    assert sizes[1] < 0.65 * sizes[0]  # tiny layers: scales and padding count


def test_bfloat16_models_are_quantized_too():
    model = sparse_clip()
    half = clipup.accelerate(copy.deepcopy(model).to(torch.bfloat16), weights="int8")
    assert features(half)[0].dtype == torch.bfloat16
    assert (cosines(features(half), features(model)) > 0.99).all()


def test_the_model_is_copied_unless_inplace():
    model = sparse_clip()
    before = features(model)
    int8 = clipup.accelerate(model, weights="int8")
    assert int8 is not model and all(map(torch.equal, features(model), before))
    assert clipup.accelerate(model, inplace=True, weights="int8") is model
    assert all(map(torch.equal, features(model), features(int8)))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_copies_pickles_and_threads_compute_the_same(weights):
    prepared = clipup.accelerate(sparse_clip(), weights=weights)
    expected = features(prepared)
    for same in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert all(map(torch.equal, features(same), expected))
    torch.manual_seed(0)
    images, _ = random_inputs(prepared, batch_size=3)
    wrong = []

    def call():
        with torch.inference_mode():
            wrong.extend(i for i in range(5) if not torch.equal(prepared.encode_image(images), expected[0]))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PICKLED = """
import pickle, sys, torch, clipup
torch.manual_seed(0)
layer = clipup.SparseMoE(33, 70, gated=True, shared_expert=True).eval()
x = torch.randn(9, 33)
int8 = clipup.accelerate(layer, weights="int8")
with torch.inference_mode():
    pickle.dump((int8, x, int8(x)), sys.stdout.buffer)
"""


@pytest.mark.slow
def test_a_pickle_of_another_cpu_is_packed_again():
    environment = os.environ | {"CLIPUP_CPU_ISA": "avx2"}
    written = subprocess.run([sys.executable, "-c", PICKLED], env=environment, capture_output=True, check=True).stdout
    int8, x, theirs = pickle.loads(written)
    with torch.inference_mode():
        assert (int8(x) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_plain_weights_are_gone_and_nothing_pretends_otherwise(tmp_path):
    int8 = clipup.accelerate(sparse_clip(), weights="int8")
    with pytest.raises(RuntimeError, match="holds int8 weights, from which the state dict of the plain layer cannot"):
        int8.state_dict()
    with pytest.raises(RuntimeError, match="no training mode"):
        int8.train()
    with pytest.raises(ValueError, match="prepared by clipup.accelerate"):
        clipup.save_pretrained(int8, tmp_path / "model", {})
    with pytest.raises(ValueError, match="prepared with weights='int8' before, and cannot be changed to None"):
        clipup.accelerate(int8)
    with pytest.raises(ValueError, match="prepared with weights=None before, and cannot be changed to 'int8'"):
        clipup.accelerate(clipup.accelerate(sparse_clip()), weights="int8")
    again = clipup.accelerate(int8, weights="int8")
    assert all(map(torch.equal, features(again), features(int8)))


def test_it_loads_the_weights_of_a_plain_model():
    other = sparse_clip()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    int8 = clipup.accelerate(sparse_clip(), weights="int8")
    int8.load_state_dict(other.state_dict())
    assert all(map(torch.equal, features(int8), features(clipup.accelerate(other, weights="int8"))))


def test_one_of_two_matrices_with_the_same_input_is_loaded():
    torch.manual_seed(0)
    layer, other = (clipup.SparseMoE(32, 64, gated=True).eval() for _ in range(2))
    with torch.no_grad():
        other.in_weight[..., :3] *= 50
    int8 = clipup.accelerate(layer, weights="int8")
    int8.load_state_dict({"in_weight": other.in_weight.detach()}, strict=False)
    layer.load_state_dict({"in_weight": other.in_weight.detach()}, strict=False)
    x = torch.randn(9, 32)
    with torch.inference_mode():
        assert (int8(x) - layer(x)).norm() <= 5e-2 * layer(x).norm()


@pytest.mark.parametrize("shape", [(3072, 768), (256, 512)], ids=str)
@pytest.mark.parametrize(
    "outlier, factor",
    [("weight", 100), ("weight", 1000), ("weight", float("inf")), ("input", 100), ("input", 1000)]
    + [("output", 0), ("output", 1000)],
)
def test_an_outlier_costs_the_other_outputs_nothing(outlier, factor, shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(shape[1], shape[0], bias=False), torch.randn(32, shape[1])
    with torch.no_grad():
        {"weight": linear.weight[0, 7:8], "input": x[:, 7], "output": linear.weight[0]}[outlier].mul_(factor)
        exact = F.linear(x.double(), linear.weight.double())[:, 1:]
        plain = clipup_kernels.pack_weight(linear.weight[None], "int8")
        offsets = torch.tensor([0, 32], dtype=torch.int32)
        without = clipup_kernels.grouped_linear(x, plain, None, offsets)[:, 1:]
        found = PreparedLinear(linear, "int8")(x)[:, 1:]
    assert (found - exact).norm() <= 1.1 * (without - exact).norm()


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="weights must be one of int8, got 'int3'"):
        clipup.accelerate(sparse_clip(), weights="int3")
    with pytest.raises(RuntimeError, match=r"no backend computes packed_expert_mlp in torch\.float64"):
        clipup.accelerate(sparse_clip().double(), weights="int8")


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@only_open_clip_4
@pytest.mark.parametrize(
    "change",
    [
        lambda attn: hooked(attn.out_proj),
        lambda attn: hooked(attn.out_drop),
        lambda attn: hooked(attn.ln_q),
        lambda attn: setattr(attn.out_proj, "forward", torch.tanh),
        lambda attn: setattr(attn, "out_proj", OwnLinear(32, 32)),
        lambda attn: setattr(attn, "out_drop", nn.Tanh()),
        lambda attn: setattr(attn, "scale", 1.0),
        lambda attn: setattr(attn, "use_sdpa", False),
        lambda attn: nn.utils.parametrizations.weight_norm(attn.out_proj),
    ],
)
def test_attention_of_open_clip_4_with_other_parts_is_left_as_it_is(change):
    model = sparse_clip()
    attention = model.transformer.resblocks[0].attn
    change(attention)
    int8 = clipup.accelerate(model, weights="int8")
    assert type(int8.transformer.resblocks[0].attn) is type(attention)
    assert (cosines(features(int8), features(model)) > 0.995).all()


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_default_device_is_not_that_of_the_masks_and_offsets(weights):
    model, wanted = clipup.accelerate(sparse_clip(), weights=weights), None
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        images, texts = random_inputs(model, batch_size=3)
        with torch.device(device), torch.inference_mode():
            found = model.encode_image(images), model.encode_text(texts)
        wanted = wanted or found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_model_is_exported_with_any_batch(weights):
    model = clipup.accelerate(sparse_clip(), weights=weights)
    images, _ = random_inputs(model, batch_size=3)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model.visual, (images,), dynamic_shapes=({0: batch},)).module()
    more, _ = random_inputs(model, batch_size=5)
    with torch.inference_mode():
        torch.testing.assert_close(exported(more), model.visual(more))


def test_weights_of_a_prepared_layer_cannot_be_set():
    model = clipup.accelerate(sparse_clip(), weights="int8")
    block = clipup.accelerate(tiny_clip().eval(), weights="int8").transformer.resblocks[0]
    for layer, name, value in (
        (block.attn, "in_proj_weight", nn.Parameter(torch.zeros(96, 32))),
        (block.attn, "in_proj_bias", nn.Parameter(torch.zeros(96))),
        (block.attn, "out_proj", nn.Linear(32, 32)),
        (block.mlp, "c_fc", nn.Linear(32, 64)),
        (block.mlp, "c_proj", nn.Linear(64, 32)),
        (model.transformer.resblocks[0].mlp, "in_weight", nn.Parameter(torch.zeros(8, 64, 32))),
        (PreparedLinear(nn.Linear(32, 32), "int8"), "bias", nn.Parameter(torch.zeros(32))),
    ):
        with pytest.raises(AttributeError, match=f"{name} of a prepared layer cannot be set"):
            setattr(layer, name, value)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_hooked_attention_is_left_as_it_is(weights):
    model = sparse_clip()
    seen = []
    model.transformer.resblocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    prepared = clipup.accelerate(model, weights=weights)
    features(prepared)
    assert seen and not isinstance(prepared.transformer.resblocks[0].attn, Prepared)


def test_coca_keeps_its_cross_attention():
    torch.manual_seed(0)
    model = build(coca_cfg()).eval()
    int8 = clipup.accelerate(model, weights="int8")
    images, texts = random_inputs(model, batch_size=2)
    with torch.inference_mode():
        ours, theirs = int8(images, texts), model(images, texts)
    assert F.cosine_similarity(ours["logits"].flatten(), theirs["logits"].flatten(), dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TIMM if not name.endswith("normed")])
def test_timm_towers_are_quantized(name):
    model = timm_model(name).eval()
    int8 = clipup.accelerate(model, weights="int8")
    torch.manual_seed(0)
    images, _ = random_inputs(model, batch_size=2)
    with torch.inference_mode():
        assert (cosines([int8(images)], [model(images)]) > 0.98).all()


PROJECTIONS = {"q_proj", "qkv", "Wqkv", "query", "q", "out_proj", "o_proj", "proj", "Wo", "dense", "o"}


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if not name.startswith(("Bert", "Roberta", "XLM"))])
def test_transformers_models_are_quantized_with_their_attention(name):
    model = tiny_hugging_face(name)
    int8 = clipup.accelerate(model, weights="int8")
    linear = {path.rsplit(".", 1)[1] for path, module in int8.named_modules() if isinstance(module, PreparedLinear)}
    assert len(linear & PROJECTIONS) >= 2
    inputs = random_batch(model, 2)
    with torch.inference_mode():
        ours, theirs = int8(**inputs), model(**inputs)
    compared = [name for name in ("image_embeds", "text_embeds") if name in theirs] or [next(iter(theirs))]
    for output in compared:
        assert (cosines([ours[output].flatten(1)], [theirs[output].flatten(1)]) > 0.98).all(), output


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_towers_are_quantized(name, tmp_path):
    model = build(hugging_face_cfg(HUGGING_FACE[name](), tmp_path)).eval()
    int8 = clipup.accelerate(model, weights="int8")
    assert (cosines(features(int8), features(model)) > 0.98).all()


@pytest.mark.parametrize("weights", [None, "int8"])
def test_compiled_models_compute_the_same(weights):
    prepared = clipup.accelerate(sparse_clip(), weights=weights)
    torch.manual_seed(0)
    images, _ = random_inputs(prepared, batch_size=2)
    compiled = torch.compile(prepared.visual, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(images), prepared.visual(images))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_empty_batches_are_encoded(weights):
    prepared = clipup.accelerate(sparse_clip(), weights=weights)
    _, texts = random_inputs(prepared, batch_size=2)
    with torch.inference_mode():
        assert prepared.encode_text(texts[:0]).shape == (0, 16)
        attention = PreparedAttention(nn.MultiheadAttention(32, 2, batch_first=True).eval(), weights)
        assert attention(*[torch.zeros(3, 0, 32)] * 3, need_weights=False)[0].shape == (3, 0, 32)
        half = PreparedAttention(nn.MultiheadAttention(32, 2, batch_first=True).bfloat16().eval(), weights)
        assert half(*[torch.zeros(3, 0, 32).bfloat16()] * 3, need_weights=False)[0].shape == (3, 0, 32)


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(32, 2, batch_first=True), clipup.SparseMoE(32, 64)

    def forward(self, x):
        return self.mlp(x + self.attn(x, x, x)[0])  # need_weights=True


@pytest.mark.parametrize("weights", [None, "int8"])
def test_attention_of_unknown_blocks_is_left_as_it_is(weights):
    torch.manual_seed(0)
    model = OwnBlock().eval()
    prepared = clipup.accelerate(model, weights=weights)
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        assert (prepared(x) - model(x)).norm() <= 3e-2 * model(x).norm()


@pytest.mark.parametrize(
    "error, spoil",
    [
        (RuntimeError, lambda block: block.mlp.double()),
        (ValueError, lambda block: setattr(block, "mlp", clipup.SparseMoE(32, 65_537, num_experts=1, top_k=1))),
    ],
    ids=["float64", "more inputs than the kernels sum"],
)
def test_a_model_with_one_layer_that_cannot_be_quantized_is_refused_before_anything_changes(error, spoil):
    model = sparse_clip()
    spoil(model.transformer.resblocks[2])
    with pytest.raises(error, match=r"^transformer\.resblocks\.2\.mlp cannot be prepared"):
        clipup.accelerate(model, inplace=True, weights="int8")
    assert not any(isinstance(module, Prepared) for module in model.modules())


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("packed_before", [0, 1, 3, 5, 17, 25])
def test_memory_that_ends_half_way_leaves_whole_layers(packed_before, weights, monkeypatch):
    """In the first layer, in its shared expert, in the second layer, in a dense MLP, in attention."""
    torch.manual_seed(0)
    model = clipup.upcycle(tiny_clip(), clipup.MoEConfig(shared_expert=True)).eval()
    plain, whole = features(model), features(clipup.accelerate(model, weights=weights))
    module, left = importlib.import_module("clipup.dense.prepared"), [None] * packed_before

    def pack_weight(*args):
        if not left:
            raise MemoryError
        left.pop()
        return clipup_kernels.pack_weight(*args)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(module, "pack_weight", pack_weight)
        clipup.accelerate(model, inplace=True, weights=weights)
    assert (cosines(features(model), plain) > 0.995).all()
    clipup.accelerate(model, inplace=True, weights=weights)
    assert all(map(torch.equal, features(model), whole))
