import pytest
import torch
from moe_cases import assert_follows, covering, double, randn, seeded

from clipup_kernels import reference
from clipup_kernels.backends import torch_eager
from clipup_kernels.triton import topk_gating as triton_gating

pytestmark = pytest.mark.interpreter

CASES = {
    "plain": dict(tokens=150, experts=8, k=2, renormalize=True),
    "raw gates": dict(tokens=70, experts=8, k=2, renormalize=False),
    "one choice": dict(tokens=33, experts=5, k=1, renormalize=False),
    "every expert": dict(tokens=9, experts=4, k=4, renormalize=True),
    "one expert": dict(tokens=9, experts=1, k=1, renormalize=True),
    "one token": dict(tokens=1, experts=8, k=2, renormalize=True),
    "many experts": dict(tokens=50, experts=200, k=7, renormalize=True),
    "masked": dict(tokens=140, experts=8, k=2, renormalize=True, masked=0.5),
    "masked raw": dict(tokens=40, experts=6, k=3, renormalize=False, masked=0.5),
    "all masked": dict(tokens=7, experts=8, k=2, renormalize=True, masked=1.0),
    "no tokens": dict(tokens=0, experts=8, k=2, renormalize=True),
    "biased choice": dict(tokens=70, experts=8, k=3, renormalize=True, biased=0.3),
    "choice of no probability": dict(tokens=40, experts=8, k=2, renormalize=True, biased=10.0, scale=60.0),
    "large logits": dict(tokens=40, experts=8, k=2, renormalize=True, scale=60.0),
}


def arguments(tokens, experts, k, renormalize, masked=0.0, biased=0.0, scale=1.0):
    logits = scale * randn(tokens, experts, seed=tokens)
    mask = torch.rand(tokens, generator=seeded(1)) >= masked if masked else None
    if mask is not None:
        logits[~mask] = torch.nan
    bias = biased * randn(experts, seed=2) if biased else None
    return logits, k, renormalize, bias, mask


def oracle_of(logits, k, renormalize, bias, mask):
    return reference.topk_gating(logits.double(), k, renormalize, double(bias), mask)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gating_follows_the_oracle(case):
    args = arguments(**case)
    ours, oracle = triton_gating.topk_gating(*args), oracle_of(*args)
    for name, value, want in zip(oracle._fields, ours, oracle, strict=True):
        if want.dtype == torch.int32:
            assert torch.equal(value, want), name
        else:
            assert value.dtype == torch.float32
            assert_follows(value, want, torch.float32, name)


@pytest.mark.parametrize(
    "case",
    covering(case=CASES, wanted=("all",))
    + covering(case=("masked", "masked raw"), wanted=("gates", "top_prob", "mean_probs", "z_loss")),
)
def test_gradient_of_gating_follows_the_oracle(case):
    logits, k, renormalize, bias, mask = arguments(**CASES[case["case"]])
    oracle = oracle_of(logits, k, renormalize, bias, mask)
    incoming = [
        randn(getattr(oracle, name).numel(), seed=10 + position).view_as(getattr(oracle, name))
        if case["wanted"] in ("all", name)
        else None
        for position, name in enumerate(("gates", "top_prob", "mean_probs", "z_loss"))
    ]
    ours = triton_gating.topk_gating_backward(logits, oracle.expert_indices, renormalize, mask, *incoming)
    wide = [double(gradient) for gradient in incoming]
    clean = logits if mask is None else torch.where(mask[:, None], logits, 0)
    want = torch_eager.topk_gating_backward(clean.double(), oracle.expert_indices, renormalize, mask, *wide)
    assert_follows(ours, want, torch.float32, "gradient of logits")


def test_statistics_of_many_programs_are_added_up(monkeypatch):
    monkeypatch.setattr(triton_gating, "_MAX_PROGRAMS", 3)
    logits = randn(2000, 16)
    ours, oracle = triton_gating.topk_gating(logits, 2, True), oracle_of(logits, 2, True, None, None)
    assert_follows(ours[3], oracle.mean_probs, torch.float32, "mean_probs")
    assert_follows(ours[4], oracle.z_loss, torch.float32, "z_loss")
    assert torch.equal(ours[5], oracle.tokens_per_expert)


def test_nan_logits_never_give_an_expert_that_does_not_exist():
    logits = randn(64, 8)
    logits[::3, 2] = torch.nan
    logits[1::3] = torch.nan
    _, experts, *_ = triton_gating.topk_gating(logits, 3, True)
    assert ((experts >= 0) & (experts < 8)).all()
    assert all(len(set(row)) == 3 for row in experts.tolist())


def test_normalized_gates_are_those_of_the_choices_however_improbable_and_zero_of_impossible_ones():
    logits = torch.tensor([[0.0, -300.0, -300.0], [0.0, -torch.inf, -torch.inf], [0.0, 1.0, torch.nan]])
    bias = torch.tensor([-10.0, 0.0, 0.0])
    gates, experts, *_ = triton_gating.topk_gating(logits, 2, True, bias)
    assert experts[:2].tolist() == [[1, 2]] * 2 and gates[:2].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert gates[2].isnan().all()
    gradient = triton_gating.topk_gating_backward(logits[:2], experts[:2], True, None, torch.tensor([[1.0, 2.0]] * 2))
    assert gradient.tolist() == [[0.0, -0.25, 0.25], [0.0, 0.0, 0.0]]


def test_strided_arguments_are_read_as_they_are_indexed():
    logits, mask = randn(8, 60).T, (torch.arange(120) % 3 > 0)[::2]
    assert not logits.is_contiguous() and not mask.is_contiguous()
    ours = triton_gating.topk_gating(logits, 2, True, None, mask)
    dense = triton_gating.topk_gating(logits.contiguous(), 2, True, None, mask.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    gradient = randn(60).expand(2, 60).T
    assert_follows(
        triton_gating.topk_gating_backward(logits, ours[1], True, mask, gradient * torch.tensor([1.0, -1.0])),
        torch_eager.topk_gating_backward(
            logits.double(), ours[1], True, mask, gradient.double() * torch.tensor([1, -1])
        ),
        torch.float32,
    )
