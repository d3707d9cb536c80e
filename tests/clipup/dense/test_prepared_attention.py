"""Prepared attention and linear layers, plain and int8: torch's and open_clip's results, and what they refuse."""

import copy

import pytest
import torch
from open_clip.transformer import Attention, ResidualAttentionBlock
from open_clip_4 import only_open_clip_4
from torch import nn

import clipup_kernels
from clipup import accelerate
from clipup.dense.prepared_attention import (
    PreparedAttention,
    PreparedLinear,
    can_be_prepared,
    linear_can_be_prepared,
    prepared_attention,
)

pytestmark = pytest.mark.skipif(
    not clipup_kernels.backend_info()["compiled"], reason="int8 needs the compiled extension"
)
with_weights = pytest.mark.parametrize("weights", [None, "int8"])


def assert_follows(ours, theirs, weights):
    """Up to rounding in ours's type, or up to quantization."""
    tolerance = 2e-2 if weights == "int8" else 1e-5 if ours.dtype == torch.float32 else 1e-2
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


@with_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "boolean", "by head", "padding", "both"])
def test_attention_follows_torch(masks, batch_first, dtype, weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, batch_first=batch_first).eval()
    nn.init.normal_(plain.in_proj_bias)
    prepared = PreparedAttention(copy.deepcopy(plain).to(dtype), weights)
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
        ours, shares = prepared(rounded, rounded, rounded, need_weights=False, **options)
    assert shares is None and ours.dtype == dtype
    assert_follows(ours, theirs, weights)


@with_weights
def test_attention_without_a_batch_follows_torch(weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, bias=False).eval()
    x = torch.randn(7, 64)
    with torch.inference_mode():
        theirs, _ = plain(x, x, x, need_weights=False)
        ours, _ = PreparedAttention(plain, weights)(x, x, x, need_weights=False)
    assert_follows(ours, theirs, weights)


def test_attention_refuses_what_it_does_not_compute():
    attention = PreparedAttention(nn.MultiheadAttention(64, 4).eval(), "int8")
    x = torch.randn(7, 2, 64)
    with pytest.raises(NotImplementedError, match="self-attention only: key and value must be query"):
        attention(x, x.clone(), x, need_weights=False)
    with pytest.raises(NotImplementedError, match="returns no attention weights; pass need_weights=False"):
        attention(x, x, x)
    with pytest.raises(ValueError, match="is_causal says that attn_mask is causal, and there is none; pass the mask"):
        attention(x, x, x, need_weights=False, is_causal=True)
    with pytest.raises(TypeError, match="a MultiheadAttention with separate projections, bias_k, add_zero_attn"):
        PreparedAttention(nn.MultiheadAttention(64, 4, kdim=32), "int8")
    with pytest.raises(TypeError, match=r"x is torch\.float64, but the layer was prepared in torch\.float32"):
        attention(*[x.double()] * 3, need_weights=False)


@only_open_clip_4
@with_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", ["none", "additive", "boolean", "by head", "of each text"])
def test_attention_of_open_clip_4_follows_it(masks, dtype, weights):
    torch.manual_seed(0)
    plain = Attention(64, num_heads=4).eval()
    nn.init.normal_(plain.in_proj_bias)
    prepared = prepared_attention(copy.deepcopy(plain).to(dtype), weights)
    x, past = torch.randn(3, 7, 64), torch.ones(7, 7, dtype=torch.bool).tril()
    mask = {
        "none": None,
        "additive": torch.zeros(7, 7).masked_fill(~past, float("-inf")),
        "boolean": past,
        "by head": torch.randn(12, 7, 7),
        "of each text": (torch.arange(7) < torch.tensor([[7], [4], [5]]))[:, None, None],
    }[masks]
    with torch.inference_mode():
        theirs, ours = plain(x, attn_mask=mask), prepared(x.to(dtype), attn_mask=mask)
    assert ours.dtype == dtype
    assert_follows(ours, theirs, weights)
    with pytest.raises(NotImplementedError, match="self-attention only: k_x and v_x must be x or None"):
        prepared(x.to(dtype), k_x=x.clone())
    assert not can_be_prepared(Attention(64, num_heads=4, qk_norm=True))


def test_attention_of_another_class_of_that_name_is_left_as_it_is():
    class Attention3(Attention):  # open_clip 3's, in whose boolean masks True excludes
        pass

    attention = Attention3(32, num_heads=2)
    attention.use_sdpa = False
    assert not can_be_prepared(attention)


def test_attention_with_another_output_projection_is_left_as_it_is():
    attention = Attention(32, num_heads=2)
    attention.out_proj = nn.Sequential(attention.out_proj, nn.Tanh())
    assert not can_be_prepared(attention)


def test_linear_layers_of_a_class_without_a_bias_are_left_as_they_are():
    class Unbiased(nn.Linear):
        def __init__(self):
            super().__init__(4, 3, bias=False)
            del self.bias

    assert not linear_can_be_prepared(Unbiased())


@with_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [7, 520])
def test_a_query_that_sees_nothing_gives_the_bias_of_the_output(dtype, length, weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 2, batch_first=True).to(dtype).eval()
    nn.init.normal_(plain.out_proj.bias)
    prepared = PreparedAttention(plain, weights)
    x = torch.randn(2, length, 32, dtype=dtype)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[3] = True
    with torch.inference_mode():
        ours, _ = prepared(x, x, x, need_weights=False, attn_mask=mask)
        rest, _ = prepared(x, x, x, need_weights=False)
    torch.testing.assert_close(ours[:, 3], plain.out_proj.bias.expand(2, -1))
    torch.testing.assert_close(torch.cat([ours[:, :3], ours[:, 4:]], 1), torch.cat([rest[:, :3], rest[:, 4:]], 1))


@with_weights
def test_a_linear_layer_follows_torch(weights):
    torch.manual_seed(0)
    plain = nn.Linear(64, 40)
    x = torch.randn(2, 5, 64)
    with torch.inference_mode():
        theirs, ours = plain(x), PreparedLinear(plain, weights)(x)
    assert_follows(ours, theirs, weights)


@with_weights
def test_weights_may_lie_transposed_in_memory(weights):
    torch.manual_seed(0)
    plain = nn.Linear(64, 40)
    plain.weight = nn.Parameter(torch.randn(64, 40).t())
    prepared = PreparedLinear(plain, weights)
    x = torch.randn(5, 64)
    with torch.inference_mode():
        before = prepared(x)
        prepared.load_state_dict(plain.state_dict())
        assert torch.equal(prepared(x), before)
    if weights is None:
        assert all(torch.equal(prepared.state_dict()[name], value) for name, value in plain.state_dict().items())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_exported_program_takes_sequences_of_every_length(dtype):
    torch.manual_seed(0)
    block = ResidualAttentionBlock(32, 2).eval().to(dtype)
    prepared = accelerate(block)
    sizes = {"q_x": {1: torch.export.Dim("length", min=2, max=1024)}}
    with torch.no_grad():
        program = torch.export.export(prepared, (torch.randn(2, 20, 32, dtype=dtype),), dynamic_shapes=sizes).module()
        for length in (7, 600):
            x = torch.randn(2, length, 32, dtype=dtype)
            assert_follows(program(x), block(x), None)


def test_inputs_of_other_shapes_are_refused():
    linear, x = PreparedLinear(nn.Linear(64, 40)), torch.randn(2, 7, 60)
    attention = PreparedAttention(nn.MultiheadAttention(64, 4, batch_first=True).eval())
    for wrong in (x, torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\], got \["):
            linear(wrong)
    with pytest.raises(ValueError, match=r"query must be \[\.\.\., 64\], got \[2, 7, 60\]"):
        attention(x, x, x, need_weights=False)
    for wrong in (torch.randn(64), torch.randn(2, 3, 7, 64)):
        with pytest.raises(ValueError, match=r"query must be \[B, L, 64\], or without B, got \["):
            attention(wrong, wrong, wrong, need_weights=False)
    with pytest.raises(TypeError, match=r"x is torch\.int64, but the layer was prepared in torch\.float32; pass that"):
        linear(torch.ones(2, 64, dtype=torch.int64))


@only_open_clip_4
def test_inputs_of_other_shapes_are_refused_in_open_clip_4_too():
    attention = prepared_attention(Attention(64, num_heads=4).eval(), None)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\], got \[2, 7, 60\]"):
        attention(torch.randn(2, 7, 60))
    with pytest.raises(ValueError, match=r"x must be \[B, L, 64\], got \[7, 64\]"):
        attention(torch.randn(7, 64))
