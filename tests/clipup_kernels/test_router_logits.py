"""router_logits: float32 products of tokens of any type; masked tokens have no effect."""

import pytest
import torch
from moe_cases import DTYPES, covering

import clipup_kernels as ck

SIZES = {
    "usual": (197, 96, 8),
    "one_token": (1, 64, 8),
    "no_token": (0, 32, 4),
    "one_expert": (9, 7, 1),
    "odd": (33, 45, 19),
}


def inputs(tokens, width, experts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(experts, width, generator=generator).requires_grad_()
    mask = torch.rand(tokens, generator=generator) < 0.7
    return x, weight, mask, torch.randn(tokens, experts, generator=generator)


@pytest.mark.parametrize("case", covering(size=SIZES, dtype=DTYPES, masked=(False, True)))
def test_logits_and_gradients_are_those_of_the_oracle_in_float64(case):
    dtype = case["dtype"]
    x, weight, mask, d_logits = inputs(*SIZES[case["size"]], dtype)
    mask = mask if case["masked"] else None
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = ck.reference.router_logits(exact_x, exact_weight, mask)
    logits = ck.router_logits(x, weight, mask)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_weight), d_logits.double())
    d_x, d_weight = torch.autograd.grad(logits, (x, weight), d_logits)
    assert d_x.dtype == dtype and d_weight.dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(d_x.double(), exact_grads[0], rtol=rounding, atol=1e-5)
    torch.testing.assert_close(d_weight.double(), exact_grads[1], rtol=1e-5, atol=1e-4)


def test_what_a_masked_token_holds_goes_nowhere():
    x, weight, mask, d_logits = inputs(40, 24, 6)
    poisoned = x.detach().where(mask[:, None], torch.nan).requires_grad_()
    results = []
    for tokens in (x, poisoned):
        logits = ck.router_logits(tokens, weight, mask)
        results.append((logits, *torch.autograd.grad(logits, (tokens, weight), d_logits)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[0][0][~mask] == 0).all() and (results[0][1][~mask] == 0).all()


@pytest.mark.skipif(not ck.backend_info()["compiled"], reason="the compiled kernels promise it")
@pytest.mark.parametrize(("dtype", "num_experts"), list(zip(DTYPES, (1, 3, 8), strict=True)))
def test_a_tokens_logits_do_not_depend_on_its_batch(dtype, num_experts):
    x, weight, _, _ = inputs(61, 200, num_experts, dtype)
    together = ck.router_logits(x, weight)
    apart = torch.cat([ck.router_logits(token[None], weight) for token in x])
    assert torch.equal(together, apart)


def test_only_wanted_gradients_are_computed():
    x, weight, _, d_logits = inputs(20, 16, 4)
    both = torch.autograd.grad(ck.router_logits(x, weight), (x, weight), d_logits)
    for index, frozen in ((0, weight), (1, x)):
        frozen.requires_grad_(False)
        (grad,) = torch.autograd.grad(ck.router_logits(x, weight), (x, weight)[index], d_logits)
        assert torch.equal(grad, both[index])
        frozen.requires_grad_(True)


def test_gradients_hold_in_float64():
    x, weight, mask, _ = inputs(6, 5, 3)
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: ck.router_logits(x, w, mask), (x, weight))
