"""accelerate(model, weights="int8"): experts, MLPs and attention of both towers in int8, close to the plain model."""

import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
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
from clipup.dense.prepared_attention import PreparedAttention, PreparedLinear, can_be_prepared, prepared_attention

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
        assert used >= sizes[-1]
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


def test_copies_pickles_and_threads_compute_the_same():
    int8 = clipup.accelerate(sparse_clip(), weights="int8")
    expected = features(int8)
    for same in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert all(map(torch.equal, features(same), expected))
    torch.manual_seed(0)
    images, _ = random_inputs(int8, batch_size=3)
    wrong = []

    def call():
        with torch.inference_mode():
            wrong.extend(i for i in range(5) if not torch.equal(int8.encode_image(images), expected[0]))

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


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="weights must be one of int8, got 'int3'"):
        clipup.accelerate(sparse_clip(), weights="int3")
    with pytest.raises(RuntimeError, match=r"no backend computes packed_expert_mlp in torch\.float64"):
        clipup.accelerate(sparse_clip().double(), weights="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "boolean", "by head", "padding", "both"])
def test_attention_follows_torch(masks, batch_first, dtype):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, batch_first=batch_first).eval()
    nn.init.normal_(plain.in_proj_bias)
    quantized = PreparedAttention(copy.deepcopy(plain).to(dtype), "int8")
    batch, length = 3, 7
    x = torch.randn((batch, length, 64) if batch_first else (length, batch, 64))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    padding = torch.arange(length).expand(batch, -1) >= torch.tensor([[7], [4], [5]])
    additive = torch.zeros(length, length).masked_fill(future, float("-inf"))
    options = {
        "none": {},
        "causal": {"attn_mask": additive},
        "boolean": {"attn_mask": future},
        "by head": {"attn_mask": torch.randn(batch * 4, length, length)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": future, "key_padding_mask": padding},
    }[masks]
    with torch.inference_mode():
        theirs, _ = plain(x, x, x, need_weights=False, **options)
        rounded = x.to(dtype)
        ours, weights = quantized(rounded, rounded, rounded, need_weights=False, **options)
    assert weights is None and ours.shape == theirs.shape and ours.dtype == dtype
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_attention_without_a_batch_follows_torch():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, bias=False).eval()
    x = torch.randn(7, 64)
    with torch.inference_mode():
        theirs, _ = plain(x, x, x, need_weights=False)
        ours, _ = PreparedAttention(plain, "int8")(x, x, x, need_weights=False)
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_attention_refuses_what_it_does_not_compute():
    attention = PreparedAttention(nn.MultiheadAttention(64, 4).eval(), "int8")
    x = torch.randn(7, 2, 64)
    with pytest.raises(NotImplementedError, match="self-attention only: key and value must be query"):
        attention(x, x.clone(), x, need_weights=False)
    with pytest.raises(NotImplementedError, match="returns no attention weights; pass need_weights=False"):
        attention(x, x, x)
    with pytest.raises(TypeError, match=r"x is torch\.float64, but the layer was prepared in torch\.float32"):
        attention(*[x.double()] * 3, need_weights=False)


only_open_clip_4 = pytest.mark.skipif(
    "k_x" not in inspect.signature(Attention.forward).parameters,
    reason="open_clip 3 has nn.MultiheadAttention in its blocks",
)


@only_open_clip_4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", ["none", "additive", "boolean", "by head", "of each text"])
def test_attention_of_open_clip_4_follows_it(masks, dtype):
    torch.manual_seed(0)
    plain = Attention(64, num_heads=4).eval()
    nn.init.normal_(plain.in_proj_bias)
    quantized = prepared_attention(copy.deepcopy(plain).to(dtype), "int8")
    x, past = torch.randn(3, 7, 64), torch.ones(7, 7, dtype=torch.bool).tril()
    mask = {
        "none": None,
        "additive": torch.zeros(7, 7).masked_fill(~past, float("-inf")),
        "boolean": past,
        "by head": torch.randn(12, 7, 7),
        "of each text": (torch.arange(7) < torch.tensor([[7], [4], [5]]))[:, None, None],
    }[masks]
    with torch.inference_mode():
        theirs, ours = plain(x, attn_mask=mask), quantized(x.to(dtype), attn_mask=mask)
    assert ours.shape == theirs.shape and ours.dtype == dtype and (ours - theirs).norm() <= 2e-2 * theirs.norm()
    with pytest.raises(NotImplementedError, match="self-attention only: k_x and v_x must be x or None"):
        quantized(x.to(dtype), k_x=x.clone())
    assert not can_be_prepared(Attention(64, num_heads=4, qk_norm=True))


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


def test_attention_of_another_class_of_that_name_is_left_as_it_is():
    class Attention3(Attention):  # open_clip 3's, in whose boolean masks True excludes
        pass

    attention = Attention3(32, num_heads=2)
    attention.use_sdpa = False
    assert not can_be_prepared(attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [7, 520])
def test_a_query_that_sees_nothing_gives_the_bias_of_the_output(dtype, length):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 2, batch_first=True).to(dtype).eval()
    nn.init.normal_(plain.out_proj.bias)
    quantized = PreparedAttention(plain, "int8")
    x = torch.randn(2, length, 32, dtype=dtype)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[3] = True
    with torch.inference_mode():
        ours, _ = quantized(x, x, x, need_weights=False, attn_mask=mask)
        rest, _ = quantized(x, x, x, need_weights=False)
    torch.testing.assert_close(ours[:, 3], plain.out_proj.bias.expand(2, -1))
    torch.testing.assert_close(torch.cat([ours[:, :3], ours[:, 4:]], 1), torch.cat([rest[:, :3], rest[:, 4:]], 1))


def test_a_default_device_is_not_that_of_the_masks_and_offsets():
    model, wanted = clipup.accelerate(sparse_clip(), weights="int8"), None
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        images, texts = random_inputs(model, batch_size=3)
        with torch.device(device), torch.inference_mode():
            found = model.encode_image(images), model.encode_text(texts)
        wanted = wanted or found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_model_is_exported_with_any_batch():
    model = clipup.accelerate(sparse_clip(), weights="int8")
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


def test_a_linear_layer_follows_torch():
    torch.manual_seed(0)
    plain = nn.Linear(64, 40)
    x = torch.randn(2, 5, 64)
    with torch.inference_mode():
        theirs, ours = plain(x), PreparedLinear(plain, "int8")(x)
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_hooked_attention_is_left_as_it_is():
    model = sparse_clip()
    seen = []
    model.transformer.resblocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    int8 = clipup.accelerate(model, weights="int8")
    features(int8)
    assert seen and not isinstance(int8.transformer.resblocks[0].attn, Prepared)


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


def test_compiled_models_compute_the_same():
    int8 = clipup.accelerate(sparse_clip(), weights="int8")
    torch.manual_seed(0)
    images, _ = random_inputs(int8, batch_size=2)
    compiled = torch.compile(int8.visual, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(images), int8.visual(images))


def test_empty_batches_are_encoded():
    int8 = clipup.accelerate(sparse_clip(), weights="int8")
    _, texts = random_inputs(int8, batch_size=2)
    with torch.inference_mode():
        assert int8.encode_text(texts[:0]).shape == (0, 16)
        attention = PreparedAttention(nn.MultiheadAttention(32, 2, batch_first=True).eval(), "int8")
        assert attention(*[torch.zeros(3, 0, 32)] * 3, need_weights=False)[0].shape == (3, 0, 32)


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(32, 2, batch_first=True), clipup.SparseMoE(32, 64)

    def forward(self, x):
        return self.mlp(x + self.attn(x, x, x)[0])  # need_weights=True


def test_attention_of_unknown_blocks_is_left_as_it_is():
    torch.manual_seed(0)
    model = OwnBlock().eval()
    int8 = clipup.accelerate(model, weights="int8")
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        assert (int8(x) - model(x)).norm() <= 3e-2 * model(x).norm()


def test_a_model_with_one_float64_layer_is_refused_before_anything_changes():
    model = sparse_clip()
    model.visual.transformer.resblocks[1].attn.double()
    with pytest.raises(RuntimeError, match=r"in torch\.float64"):
        clipup.accelerate(model, inplace=True, weights="int8")
    assert not any(isinstance(module, Prepared) for module in model.modules())


def test_masks_of_other_shapes_are_refused():
    attention = PreparedAttention(nn.MultiheadAttention(64, 4, batch_first=True).eval(), "int8")
    x = torch.randn(2, 7, 64)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(7, 7\) or \(8, 7, 7\), got \(1, 7\)"):
        attention(x, x, x, need_weights=False, attn_mask=torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 7\), got \(7,\)"):
        attention(x, x, x, need_weights=False, key_padding_mask=torch.zeros(7, dtype=torch.bool))
    for name, shapes in {"attn_mask": [(1, 1), (8, 8)], "key_padding_mask": [(2, 1), (2, 8)]}.items():
        for shape in shapes:
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                attention(x, x, x, need_weights=False, **{name: torch.zeros(shape)})
        for dtype in (torch.int64, torch.uint8):
            with pytest.raises(TypeError, match=rf"{name} must be boolean, or floating .* got {dtype}"):
                attention(x, x, x, need_weights=False, **{name: torch.zeros(7, 7, dtype=dtype)})
        with pytest.raises(TypeError, match=f"{name} must be a tensor"):
            attention(x, x, x, need_weights=False, **{name: [[0.0]]})
    one = x[0]
    padding = torch.arange(7) > 4
    with torch.inference_mode():
        alone, _ = attention(one, one, one, need_weights=False, key_padding_mask=padding)
        together, _ = attention(x, x, x, need_weights=False, key_padding_mask=padding.expand(2, 7))
    torch.testing.assert_close(alone, together[0])


@only_open_clip_4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_other_shapes_are_refused_in_open_clip_4_too(dtype):
    attention = prepared_attention(Attention(64, num_heads=4).to(dtype).eval(), "int8")
    x = torch.randn(2, 7, 64, dtype=dtype)
    for shape in ((7,), (1, 7, 7), (2, 7, 7), (8, 8), (2, 3, 7, 7), (1, 2, 4, 7, 7)):
        with pytest.raises(ValueError, match=r"attn_mask must have shape \(8, 7, 7\), or one of 2 or 4 dimensions"):
            attention(x, attn_mask=torch.zeros(shape))
    with pytest.raises(TypeError, match=r"attn_mask must be boolean, or floating .* got torch.int64"):
        attention(x, attn_mask=torch.ones(7, 7, dtype=torch.int64))
    for shape in ((7, 7), (1, 7), (2, 1, 1, 7), (1, 4, 7, 7), (8, 7, 7)):
        assert attention(x, attn_mask=torch.zeros(shape)).shape == x.shape
