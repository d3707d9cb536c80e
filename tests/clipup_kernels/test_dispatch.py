"""The plan of rows: slots by the rule, word by word in plain Python, for the op and for the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import plan_case

import clipup_kernels as ck


def plan_by_hand(experts, num_experts, capacity_factor, priority, mask):
    """For every expert the pairs (token, choice) in its rows."""
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 400), experts=st.integers(1, 12), k=st.integers(1, 4),
    factor=st.one_of(st.none(), st.floats(0.05, 3.0)), prioritised=st.booleans(),
    masked=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_slots_are_given_by_the_rule(tokens, experts, k, factor, prioritised, masked, seed):
    arguments = plan_case(tokens, experts, k, factor, prioritised, masked, seed).arguments
    rows = plan_by_hand(*arguments.values())
    filled = [choice for expert in rows for choice in expert]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    row_of_choice = [-1] * arguments["expert_indices"].numel()
    for row, choice in enumerate(filled):
        row_of_choice[choice] = row
    for dispatch in (ck.dispatch, ck.reference.dispatch):
        plan = dispatch(**arguments)
        assert plan.offsets.tolist() == offsets.tolist()
        assert plan.choice_of_row.tolist() == filled + [-1] * (len(row_of_choice) - len(filled))
        assert plan.row_of_choice.flatten().tolist() == row_of_choice


@pytest.mark.parametrize("factor", [None, 0.8])
def test_minus_one_stands_for_a_masked_token(factor):
    arguments = plan_case(30, 4, 2, factor, masked=0.4).arguments
    marked = torch.where(arguments["mask"][:, None], arguments["expert_indices"], -1)
    torch.testing.assert_close(ck.dispatch(**arguments), ck.dispatch(marked, 4, factor))


@pytest.mark.parametrize("expert", [4, 100, -2])
def test_an_expert_that_does_not_exist_is_refused(expert):
    experts = plan_case(10, 4, 2).arguments["expert_indices"]
    experts[7, 1] = expert
    with pytest.raises(ValueError, match=f"expert.*{expert}"):
        ck.dispatch(experts, 4)
