"""router_logits: float32 products of tokens of any type; masked tokens have no effect."""

import pytest
import torch

import clipup_kernels as ck

TYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_logits_and_gradients_are_those_of_the_oracle_in_float64(size, dtype, masked):
    x, weight, mask, d_logits = inputs(*size, dtype)
    mask = mask if masked else None
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
@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_tokens_logits_do_not_depend_on_its_batch(dtype, num_experts):
    x, weight, _, _ = inputs(61, 200, num_experts, dtype)
    together = ck.router_logits(x, weight)
    apart = torch.cat([ck.router_logits(token[None], weight) for token in x])
    assert torch.equal(together, apart)


def test_only_the_tokens_themselves_are_saved_for_backward():
    x, weight, _, _ = inputs(50, 32, 4, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ck.router_logits(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_only_wanted_gradients_are_computed():
    x, weight, _, d_logits = inputs(20, 16, 4)
    both = torch.autograd.grad(ck.router_logits(x, weight), (x, weight), d_logits)
    for index, frozen in ((0, weight), (1, x)):
        frozen.requires_grad_(False)
        (grad,) = torch.autograd.grad(ck.router_logits(x, weight), (x, weight)[index], d_logits)
        assert torch.equal(grad, both[index])
        frozen.requires_grad_(True)


def test_strided_tokens_are_routed_as_contiguous_ones():
    x, weight, _, _ = inputs(30, 64, 5)
    assert torch.equal(
        ck.router_logits(x[:, ::2], weight[:, :32]), ck.router_logits(x[:, ::2].contiguous(), weight[:, :32])
    )


def test_gradients_hold_in_float64():
    x, weight, mask, _ = inputs(6, 5, 3)
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: ck.router_logits(x, w, mask), (x, weight))


def test_a_second_derivative_is_refused_by_name():
    x, weight, _, d_logits = inputs(4, 3, 2)
    (d_x,) = torch.autograd.grad(ck.router_logits(x, weight), x, d_logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="router_logits_backward has no derivative"):
        d_x.sum().backward()


def test_the_flop_counter_sees_both_passes():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, _, d_logits = inputs(16, 8, 4)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(ck.router_logits(x, weight), (x, weight), d_logits)
    assert counter.get_total_flops() == 3 * 2 * 16 * 8 * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.randn(3)), ValueError, r"x must have shape \[T, D\], got \[3\]"),
        (dict(x=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "x must be float32 or bfloat16"),
        (dict(weight=torch.randn(2, 5)), ValueError, r"weight must have shape \[E, 4\], got \[2, 5\]"),
        (dict(weight=torch.randn(2, 4).bfloat16()), TypeError, "weight must be float32, got bfloat16"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), ValueError, r"mask must have shape \[3\], got \[2\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    arguments = dict(x=torch.randn(3, 4), weight=torch.randn(2, 4), mask=None) | change
    with pytest.raises(error, match=message):
        ck.router_logits(**arguments)
