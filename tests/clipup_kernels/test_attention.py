"""Self-attention against softmax attention in float64, exact and in int8."""

import math

import pytest
import torch
from moe_cases import DTYPES, TOLERANCE, randn, usual
from torch.utils.flop_counter import FlopCounterMode

import clipup_kernels as ck
from clipup_kernels.backends import extension

BACKENDS = ("torch_eager",) if extension.NATIVE is None else ("cpp", "torch_matmul", "torch_eager")
SIZES = {
    "image": (2, 197, 3, 64), "text": (3, 77, 2, 16), "odd": (2, 37, 3, 7), "one token": (1, 1, 1, 5),
    "no sequence": (0, 9, 2, 4), "no token": (2, 0, 2, 4), "wide": (1, 15, 1, 130),
}  # fmt: skip
MASKS = (None, "causal", "of each head", "of each sequence")


def qkv_and_mask(size, dtype=torch.float32, mask=None):
    batch, length, heads, d = SIZES[size]
    qkv = randn(batch, length, 3 * heads * d, dtype=dtype, seed=1)
    if mask is None:
        return qkv, heads, None
    hidden = torch.full((1, 1, length, length), float("-inf")).triu(1)
    if mask != "causal":
        hidden = randn(*((1, heads) if mask == "of each head" else (batch, heads)), length, length, seed=2)
        hidden[..., ::3] = float("-inf")
        hidden[..., :1, :] = float("-inf")  # a query that sees nothing
    return qkv, heads, hidden


def exact(qkv, heads, mask):
    batch, length, width = qkv.shape
    q, k, v = qkv.double().view(batch, length, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    shares = (scores if mask is None else scores + mask).softmax(-1).nan_to_num()
    return (shares @ v).transpose(1, 2).reshape(batch, length, width // 3)


def error_of(y, oracle):
    return ((y.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("case", usual(size=SIZES, dtype=DTYPES, mask=MASKS, backend=BACKENDS))
def test_attention_follows_the_oracle(force_backend, case):
    force_backend(case.get("backend"))
    call = qkv_and_mask(case["size"], case["dtype"], case["mask"])
    y, oracle = ck.self_attention(*call), exact(*call)
    assert y.shape == oracle.shape and y.dtype == case["dtype"]
    assert error_of(y, oracle) <= TOLERANCE[case["dtype"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_the_smallest_float_hides_keys_and_gives_numbers_where_all_are_hidden(force_backend, dtype, backend):
    """transformers masks so, padded queries included."""
    force_backend(backend)
    qkv, heads, mask = qkv_and_mask("odd", dtype, "of each head")
    y = ck.self_attention(qkv, heads, mask.clamp_min(torch.finfo(torch.float32).min))
    assert torch.equal(y[:, 1:], ck.self_attention(qkv, heads, mask)[:, 1:])
    assert y[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["image", "text", "odd"])
def test_int8_attention_stays_close(size, dtype):
    qkv, heads, _ = qkv_and_mask(size, dtype)
    assert error_of(ck.self_attention(qkv, heads, quantize="int8"), exact(qkv, heads, None)) < 0.03


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_common_part_of_keys_or_values_costs_int8_attention_no_accuracy(part):
    """Keys and values of trained models have a large common part; it is subtracted before they are quantized."""
    qkv, heads, _ = qkv_and_mask("image")
    common = torch.zeros(3, qkv.shape[2] // 3)
    common[("queries", "keys", "values").index(part)] = 20 * randn(qkv.shape[2] // 3, seed=3)
    shifted = qkv + common.flatten()
    error = ck.self_attention(shifted, heads, quantize="int8").double() - exact(shifted, heads, None)
    assert error.norm() < 0.03 * exact(qkv, heads, None).norm()


def test_small_shares_beside_a_large_one_count_in_int8_attention():
    """Trained vision towers have tokens that take most of the attention. Each share of the rest then rounds to zero."""
    length, d, share = 577, 64, 0.7
    queries, keys, values = torch.zeros(length, d), torch.zeros(length, d), randn(length, d, seed=1)
    queries[:, 0], values[0] = d**0.5, 0.0
    keys[0, 0] = math.log(share / (1 - share) * (length - 1))
    values[1:] += randn(d, seed=2)
    qkv = torch.cat([queries, keys, values], -1)[None]
    assert error_of(ck.self_attention(qkv, 1, quantize="int8"), exact(qkv, 1, None)) < 0.03


@pytest.mark.skipif(extension.NATIVE is None, reason="the compiled kernels promise it")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch(quantize):
    qkv, heads, _ = qkv_and_mask("image", torch.bfloat16)
    both = ck.self_attention(qkv, heads, quantize=quantize)
    assert torch.equal(both[1:], ck.self_attention(qkv[1:], heads, quantize=quantize))


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"qkv": torch.zeros(2, 12)}, ValueError, "qkv"),
        ({"qkv": torch.zeros(2, 5, 12, dtype=torch.int32)}, TypeError, "qkv"),
        ({"heads": 5}, ValueError, "heads"),
        ({"heads": 0}, ValueError, "heads"),
        ({"mask": torch.zeros(5, 5)}, ValueError, "mask"),
        ({"mask": torch.zeros(1, 3, 5, 5)}, ValueError, "mask"),
        ({"mask": torch.zeros(1, 1, 5, 5).bool()}, TypeError, "mask"),
        ({"quantize": "int4"}, ValueError, "quantize"),
    ],
)
def test_a_wrong_argument_is_named(changes, error, name):
    with pytest.raises(error, match=name):
        ck.self_attention(**{"qkv": torch.zeros(2, 5, 12), "heads": 2} | changes)


def test_self_attention_is_an_op_of_torch_without_a_derivative():
    qkv, heads, mask = qkv_and_mask("text", mask="causal")
    compiled = torch.compile(ck.self_attention, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(qkv, heads, mask), ck.self_attention(qkv, heads, mask))
    with FlopCounterMode(display=False) as counter:
        ck.self_attention(qkv, heads)
    batch, length, _, d = SIZES["text"]
    assert counter.get_total_flops() == 4 * batch * length**2 * heads * d
    with pytest.raises(NotImplementedError, match="self_attention"):
        ck.self_attention(qkv.clone().requires_grad_(), heads).sum().backward()
