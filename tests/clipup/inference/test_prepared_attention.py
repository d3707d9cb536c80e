"""Prepared attention and linear layers, plain and int8: torch's and open_clip's results, and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import Attention, ResidualAttentionBlock
from tiny_families import HAS_MODERN_TEXT
from torch import nn

import clipup_kernels
from clipup import accelerate
from clipup.inference.prepared_attention import PreparedAttention, PreparedOpenClipAttention, can_be_prepared
from clipup.inference.prepared_linear import PreparedLinear, PreparedPatches, patches_can_be_prepared

pytestmark = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="int8 needs the C++ extension")
with_weights = pytest.mark.parametrize("weights", [None, "int8"])
in_both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)
ADDITIVE = torch.zeros(7, 7).masked_fill(FUTURE, float("-inf"))


def assert_follows(ours, theirs, weights):
    """Up to rounding in ours's type, or up to quantization."""
    tolerance = 2e-2 if weights == "int8" else 1e-5 if ours.dtype == torch.float32 else 1e-2
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


@with_weights
@in_both_types
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, ADDITIVE, FUTURE, torch.randn(12, 7, 7)], ids=["none", "+", "bool", "by head"])
def test_attention_follows_torch(mask, batch_first, dtype, weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, batch_first=batch_first, bias=batch_first).eval()
    prepared = PreparedAttention(copy.deepcopy(plain).to(dtype), weights)
    x = torch.randn((3, 7, 64) if batch_first else (7, 3, 64))
    with torch.inference_mode():
        theirs, _ = plain(x, x, x, need_weights=False, attn_mask=mask)
        rounded = x.to(dtype)
        ours, shares = prepared(rounded, rounded, rounded, need_weights=False, attn_mask=mask)
    assert shares is None and ours.dtype == dtype
    assert_follows(ours, theirs, weights)


@pytest.mark.skipif(not HAS_MODERN_TEXT, reason="open_clip 3 has nn.MultiheadAttention in its blocks")
@with_weights
@in_both_types
@pytest.mark.parametrize("mask", [None, ADDITIVE, ~FUTURE, torch.randn(12, 7, 7)], ids=["none", "+", "bool", "by head"])
def test_attention_of_open_clip_4_follows_it(mask, dtype, weights):
    torch.manual_seed(0)
    plain, x = Attention(64, num_heads=4).eval(), torch.randn(3, 7, 64)
    prepared = PreparedOpenClipAttention(copy.deepcopy(plain).to(dtype), weights)
    with torch.inference_mode():
        theirs, ours = plain(x, attn_mask=mask), prepared(x.to(dtype), attn_mask=mask)
    assert ours.dtype == dtype
    assert_follows(ours, theirs, weights)
    with pytest.raises(NotImplementedError, match="k_x and v_x must be x"):
        prepared(x.to(dtype), k_x=x.clone())
    assert not can_be_prepared(Attention(64, num_heads=4, qk_norm=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"key": torch.zeros(7, 2, 64)}, NotImplementedError),
        ({"need_weights": True}, NotImplementedError),
        ({"is_causal": True}, NotImplementedError),
        ({"key_padding_mask": torch.zeros(2, 7)}, NotImplementedError),
        ({"query": (wide := torch.zeros(7, 2, 64).double()), "key": wide, "value": wide}, TypeError),
    ],
)
def test_attention_refuses_what_it_does_not_compute(options, error):
    attention, x = PreparedAttention(nn.MultiheadAttention(64, 4).eval(), "int8"), torch.randn(7, 2, 64)
    with pytest.raises(error, match="key and value must be query, need_weights=False|prepared in torch.float32"):
        attention(**{"query": x, "key": x, "value": x, "need_weights": False} | options)


@pytest.mark.parametrize("other", [{"kdim": 32}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_with_other_parts_is_left_as_it_is(other):
    assert not can_be_prepared(nn.MultiheadAttention(64, 4, **other))
    attention = nn.MultiheadAttention(64, 4)
    assert can_be_prepared(attention)
    attention.out_proj = nn.Sequential(attention.out_proj, nn.Tanh())
    assert not can_be_prepared(attention)


@with_weights
@in_both_types
@pytest.mark.parametrize("length", [7, 520])
def test_a_fully_masked_query_gives_the_bias_of_the_output(dtype, length, weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 2, batch_first=True).to(dtype).eval()
    nn.init.normal_(plain.out_proj.bias)
    prepared, x = PreparedAttention(copy.deepcopy(plain), weights), torch.randn(2, length, 32, dtype=dtype)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[3] = True
    with torch.inference_mode():
        ours, _ = prepared(x, x, x, need_weights=False, attn_mask=mask)
        rest, _ = prepared(x, x, x, need_weights=False, attn_mask=torch.zeros_like(mask))
    torch.testing.assert_close(ours[:, 3], plain.out_proj.bias.expand(2, -1))
    others = torch.arange(length) != 3
    torch.testing.assert_close(ours[:, others], rest[:, others])


@with_weights
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_follows_torch(bias, weights):
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 40, bias), torch.randn(2, 5, 64)
    prepared = PreparedLinear(copy.deepcopy(plain), weights)
    with torch.inference_mode():
        assert_follows(prepared(x), plain(x), weights)
    assert tuple(prepared.weight.shape) == (40, 64) and (prepared.bias is not None) is bias
    with pytest.raises(ValueError, match="60"):
        prepared(torch.randn(7, 60))


@with_weights
@in_both_types
@pytest.mark.parametrize("size", [(16, 24), (19, 27), (8, 8)])
def test_patches_follow_the_convolution(size, dtype, weights):
    torch.manual_seed(0)
    plain, x = nn.Conv2d(3, 40, 8, 8), torch.randn(2, 3, *size)
    prepared = PreparedPatches(copy.deepcopy(plain).to(dtype), weights)
    with torch.inference_mode():
        assert_follows(prepared(x.to(dtype)), plain(x), weights)
    if weights is None:
        restored = nn.Conv2d(3, 40, 8, 8).to(dtype)
        restored.load_state_dict(prepared.state_dict())
        torch.testing.assert_close(restored.weight, plain.weight.to(dtype))


@pytest.mark.parametrize("size", [(3, 9), (9, 3)])
def test_images_below_a_patch_are_refused_as_by_the_convolution(size):
    plain, x = nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, *size)
    for layer in (plain, PreparedPatches(plain)):
        with pytest.raises(RuntimeError):
            layer(x)


def test_only_convolutions_of_patches_side_by_side_are_prepared():
    hooked = nn.Conv2d(3, 8, 4, 4)
    hooked.register_forward_hook(lambda *_: None)
    others = [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}, {"stride": 4, "groups": 3}]
    kinds = [nn.Conv2d(3, 9, 4, **other) for other in others] + [hooked, nn.Conv1d(3, 8, 4, 4)]
    assert patches_can_be_prepared(nn.Conv2d(3, 8, 4, 4)) and not any(map(patches_can_be_prepared, kinds))


@with_weights
def test_under_a_causal_mask_a_token_does_not_depend_on_later_ones(weights):
    """To the bit, so that a text has the same features beside longer ones."""
    prepared = PreparedAttention(nn.MultiheadAttention(64, 4, batch_first=True).eval(), weights)
    x = torch.randn(2, 7, 64)
    changed = torch.cat((x[:, :4], 9 * torch.randn(2, 3, 64)), dim=1)
    with torch.inference_mode():
        one, other = (prepared(each, each, each, need_weights=False, attn_mask=ADDITIVE)[0] for each in (x, changed))
    assert torch.equal(one[:, :4], other[:, :4]) and not torch.equal(one[:, 4:], other[:, 4:])


OUTLIERS = {"weight": (100, 1000, float("inf")), "input": (100, 1000), "output": (0, 1000)}


@pytest.mark.parametrize(("outlier", "factor"), [(what, by) for what, factors in OUTLIERS.items() for by in factors])
def test_an_outlier_costs_the_other_outputs_nothing(outlier, factor):
    torch.manual_seed(0)
    linear, x = nn.Linear(512, 256, bias=False), torch.randn(32, 512)
    with torch.no_grad():
        {"weight": linear.weight[0, 7:8], "input": x[:, 7], "output": linear.weight[0]}[outlier].mul_(factor)
        exact = F.linear(x.double(), linear.weight.double())[:, 1:]
        plain = clipup_kernels.pack_weight(linear.weight[None], "int8")
        offsets = torch.tensor([0, 32], dtype=torch.int32)
        without = clipup_kernels.grouped_linear(x, plain, None, offsets)[:, 1:]
        found = PreparedLinear(linear, "int8")(x)[:, 1:]
    assert (found - exact).norm() <= 1.1 * (without - exact).norm()


@in_both_types
def test_one_exported_program_takes_sequences_of_every_length(dtype):
    torch.manual_seed(0)
    block = ResidualAttentionBlock(32, 2).eval().to(dtype)
    sizes = {"q_x": {1: torch.export.Dim("length", min=2, max=1024)}}
    with torch.no_grad():
        example = torch.randn(2, 20, 32, dtype=dtype)
        program = torch.export.export(accelerate(block), (example,), dynamic_shapes=sizes).module()
        for length in (7, 600):
            x = torch.randn(2, length, 32, dtype=dtype)
            assert_follows(program(x), block(x), None)
