import pytest
import torch
from moe_cases import TOLERANCE, assert_follows, covering, randn, seeded

from clipup_kernels import reference
from clipup_kernels.backends import torch_eager
from clipup_kernels.triton import router_logits as triton_router

pytestmark = pytest.mark.interpreter

SIZES = {
    "plain": (50, 160, 8),
    "one token": (1, 64, 8),
    "no token": (0, 32, 4),
    "one expert": (9, 7, 1),
    "odd": (33, 45, 19),
    "wider than a block": (21, 300, 5),
}


def arguments(tokens, width, experts, dtype=torch.float32, masked=None):
    """x, weight, mask and d_logits; what masked tokens hold is NaN."""
    x, weight = randn(tokens, width, dtype=dtype, seed=tokens), randn(experts, width, seed=1)
    d_logits, mask = randn(tokens, experts, seed=2), None
    if masked is not None:
        mask = torch.rand(tokens, generator=seeded(3)) >= masked
        x[~mask], d_logits[~mask] = torch.nan, torch.nan
    return x, weight, mask, d_logits


def oracle_of(x, weight, mask, d_logits):
    """Logits and both gradients in float64."""
    x, weight, d_logits = x.double(), weight.double(), d_logits.double()
    logits = reference.router_logits(x, weight, mask)
    return logits, *torch_eager.router_logits_backward(d_logits, x, weight, mask, [True, True])


@pytest.mark.parametrize("case", covering(size=SIZES, dtype=(torch.float32, torch.float16), masked=(None, 0.4, 1.0)))
def test_logits_and_gradients_follow_the_oracle(case):
    dtype = case["dtype"]
    x, weight, mask, d_logits = arguments(*SIZES[case["size"]], dtype, case["masked"])
    logits, d_x, d_weight = oracle_of(x, weight, mask, d_logits)
    ours = triton_router.router_logits(x, weight, mask)
    assert ours.dtype == torch.float32
    assert_follows(ours, logits, torch.float32, "logits")
    ours_d_x, ours_d_weight = triton_router.router_logits_backward(d_logits, x, weight, mask, [True, True])
    assert ours_d_x.dtype == dtype and ours_d_weight.dtype == torch.float32
    assert_follows(ours_d_x, d_x, dtype, "gradient of x")
    assert_follows(ours_d_weight, d_weight, torch.float32, "gradient of weight")
    if mask is not None:
        assert (ours[~mask] == 0).all() and (ours_d_x[~mask] == 0).all()


def test_only_wanted_gradients_are_computed():
    x, weight, mask, d_logits = arguments(20, 16, 4)
    both = triton_router.router_logits_backward(d_logits, x, weight, mask, [True, True])
    d_x, nothing = triton_router.router_logits_backward(d_logits, x, weight, mask, [True, False])
    assert torch.equal(d_x, both[0]) and nothing.numel() == 0
    nothing, d_weight = triton_router.router_logits_backward(d_logits, x, weight, mask, [False, True])
    assert torch.equal(d_weight, both[1]) and nothing.numel() == 0


@pytest.mark.parametrize("ranges", [1, 3, 40])
def test_the_gradient_of_the_weight_is_the_sum_over_all_ranges_of_tokens(monkeypatch, ranges):
    monkeypatch.setattr(triton_router, "_PARTIAL_SUMS", 4 * ranges)
    x, weight, mask, d_logits = arguments(301, 16, 4)
    _, d_weight = triton_router.router_logits_backward(d_logits, x, weight, mask, [False, True])
    assert_follows(d_weight, oracle_of(x, weight, mask, d_logits)[2], torch.float32, "gradient of weight")


def test_strided_arguments_are_read_as_they_are_indexed():
    x, weight, mask = randn(30, 64)[:, ::2], randn(32, 5).T, (torch.arange(60) % 3 > 0)[::2]
    d_logits = randn(30).expand(5, 30).T
    assert not any(t.is_contiguous() for t in (x, weight, mask, d_logits))
    logits, d_x, d_weight = oracle_of(x, weight, mask, d_logits)
    assert_follows(triton_router.router_logits(x, weight, mask), logits, torch.float32)
    ours = triton_router.router_logits_backward(d_logits, x, weight, mask, [True, True])
    assert_follows(ours[0], d_x, torch.float32)
    assert_follows(ours[1], d_weight, torch.float32)


def test_float16_tokens_are_multiplied_in_float32():
    x, weight = randn(16, 256, dtype=torch.float16), randn(8, 256, seed=1)
    exact = x.double() @ weight.double().T
    rounded_weight = x.double() @ weight.half().double().T
    scale = exact.abs().max()
    assert (triton_router.router_logits(x, weight) - exact).abs().max() < TOLERANCE[torch.float32] * scale
    assert (rounded_weight - exact).abs().max() > 3 * TOLERANCE[torch.float32] * scale
