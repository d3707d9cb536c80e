import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import randn, seeded

import clipup_kernels as ck


def random_experts(tokens, experts, k, seed=0):
    return ck.reference.topk_gating(randn(tokens, experts, seed=seed), k, True).expert_indices


def plan_by_hand(experts, num_experts, capacity_factor, priority, mask):
    """The rule of slots, word by word, in plain Python."""
    tokens, k = experts.shape
    experts = experts.tolist()
    routed = [any(e >= 0 for e in row) and (mask is None or bool(mask[t])) for t, row in enumerate(experts)]
    order = list(range(tokens))
    if priority is not None:
        order.sort(key=lambda t: -priority[t].item() if not math.isnan(priority[t]) else math.inf)
    capacity = math.inf
    if capacity_factor is not None:
        capacity = math.ceil(capacity_factor * k * sum(routed) / num_experts)
    rows = [[] for _ in range(num_experts)]
    for choice in range(k):
        for t in order:
            expert = experts[t][choice]
            if routed[t] and expert >= 0 and len(rows[expert]) < capacity:
                rows[expert].append(t * k + choice)
    return rows


def assert_plan_is(plan, rows, tokens, k):
    filled = [choice for expert in rows for choice in expert]
    offsets = [0]
    for expert in rows:
        offsets.append(offsets[-1] + len(expert))
    assert plan.offsets.tolist() == offsets
    assert plan.choice_of_row.tolist() == filled + [-1] * (tokens * k - len(filled))
    row_of_choice = [-1] * (tokens * k)
    for row, choice in enumerate(filled):
        row_of_choice[choice] = row
    assert plan.row_of_choice.flatten().tolist() == row_of_choice


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 400), num_experts=st.integers(1, 12), k=st.integers(1, 4),
    factor=st.one_of(st.none(), st.floats(0.05, 3.0)), prioritised=st.booleans(),
    masked=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_slots_are_given_by_the_rule(tokens, num_experts, k, factor, prioritised, masked, seed):
    k = min(k, num_experts)
    experts = random_experts(tokens, num_experts, k, seed)
    # Coarse priorities, so that ties are common.
    priority = (torch.rand(tokens, generator=seeded(seed)) * 5).round() if prioritised else None
    mask = torch.rand(tokens, generator=seeded(seed + 1)) >= masked if masked else None
    rows = plan_by_hand(experts, num_experts, factor, priority, mask)
    for dispatch in (ck.dispatch, ck.reference.dispatch):
        assert_plan_is(dispatch(experts, num_experts, factor, priority, mask), rows, tokens, k)


def test_nan_priority_goes_last_and_decides_who_is_dropped():
    experts = torch.zeros(4, 1, dtype=torch.int32)
    plan = ck.dispatch(experts, 1, capacity_factor=0.5, priority=torch.tensor([torch.nan, 0.1, -5.0, 0.1]))
    assert plan.choice_of_row.tolist() == [1, 3, -1, -1]


def test_without_unmasked_tokens_a_huge_capacity_gives_no_rows():
    experts, none = torch.zeros(5, 1, dtype=torch.int32), torch.zeros(5, dtype=torch.bool)
    plan = ck.dispatch(experts, 2, capacity_factor=1e308, mask=none)
    assert plan.offsets.tolist() == [0, 0, 0] and (plan.row_of_choice == -1).all()


def test_minus_one_stands_for_a_masked_token():
    experts = random_experts(30, 4, 2)
    mask = torch.arange(30) % 3 > 0
    marked = torch.where(mask[:, None], experts, -1)
    for factor in (None, 0.8):
        by_mask, by_mark = ck.dispatch(experts, 4, factor, mask=mask), ck.dispatch(marked, 4, factor)
        assert all(torch.equal(a, b) for a, b in zip(by_mask, by_mark, strict=True))


@pytest.mark.parametrize("expert", [4, 100, -2])
def test_an_expert_that_does_not_exist_is_refused(expert):
    experts = random_experts(10, 4, 2)
    experts[7, 1] = expert
    with pytest.raises(ValueError, match=f"expert.*{expert}"):
        ck.dispatch(experts, 4)


def test_result_does_not_depend_on_the_number_of_threads():
    experts = random_experts(30_000, 8, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ck.dispatch(experts, 8, 0.9)
        torch.set_num_threads(2)
        two = ck.dispatch(experts, 8, 0.9)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
