import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import randn, seeded

from clipup_kernels import reference
from clipup_kernels.triton import dispatch as triton_dispatch

pytestmark = pytest.mark.interpreter


def random_experts(tokens, experts, k, seed=0):
    return reference.topk_gating(randn(tokens, experts, seed=seed), k, True).expert_indices


def assert_follows_oracle(experts, num_experts, capacity_factor=None, priority=None, mask=None):
    arguments = (experts, num_experts, capacity_factor, priority, mask)
    ours, oracle = triton_dispatch.dispatch(*arguments), reference.dispatch(*arguments)
    for name, value, want in zip(oracle._fields, ours, oracle, strict=True):
        assert value.dtype == torch.int32 and torch.equal(value, want), name
    return ours


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 1500), num_experts=st.integers(1, 20), k=st.integers(1, 4),
    factor=st.one_of(st.none(), st.floats(0.05, 3.0)), prioritised=st.booleans(),
    masked=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_plan_is_the_oracles(tokens, num_experts, k, factor, prioritised, masked, seed):
    experts = random_experts(tokens, num_experts, min(k, num_experts), seed)
    priority = (torch.rand(tokens, generator=seeded(seed)) * 5).round() if prioritised else None
    mask = torch.rand(tokens, generator=seeded(seed + 1)) >= masked if masked else None
    assert_follows_oracle(experts, num_experts, factor, priority, mask)


def test_blocks_of_several_tiles_and_many_blocks_give_the_same_plan(monkeypatch):
    monkeypatch.setattr(triton_dispatch, "_MAX_BLOCKS", 4)
    assert_follows_oracle(random_experts(5000, 16, 2), 16, 0.9, torch.rand(5000, generator=seeded(3)))


@pytest.mark.parametrize(("tokens", "num_experts"), [(165, 256), (100, 300)])
def test_many_experts_and_more_blocks_than_the_scan_takes_at_a_time(monkeypatch, tokens, num_experts):
    monkeypatch.setattr(triton_dispatch, "_SCAN_ROWS", 8)
    assert_follows_oracle(random_experts(tokens, num_experts, 2), num_experts, 1.0)


def test_an_expert_that_a_token_names_twice_gets_both_rows():
    experts = torch.randint(-1, 3, (400, 3), generator=seeded(5)).int()
    assert_follows_oracle(experts, 3)
    assert_follows_oracle(experts, 3, 0.8, mask=torch.arange(400) % 5 > 0)


def test_nan_priority_goes_last_and_signed_zeros_tie():
    experts = torch.zeros(5, 1, dtype=torch.int32)
    priority = torch.tensor([torch.nan, -0.0, 0.0, 0.1, -5.0])
    _, choice_of_row, _ = assert_follows_oracle(experts, 1, priority=priority)
    assert choice_of_row.tolist() == [3, 1, 2, 4, 0]


def test_capacity_is_computed_in_float64():
    # 1.2 * 25 / 2 is 15; the float32 next to 1.2 is a little more, and its ceiling would be 16.
    experts = torch.zeros(25, 1, dtype=torch.int32)
    offsets, *_ = assert_follows_oracle(experts, 2, capacity_factor=1.2)
    assert offsets.tolist() == [0, 15, 15]
    for factor in (1e-300, 5e-324, 1e300, 1.7e308):
        assert_follows_oracle(random_experts(50, 4, 2), 4, factor)


def test_an_expert_that_does_not_exist_gets_no_row():
    experts = random_experts(50, 4, 2)
    experts[7, 1], experts[9, 0] = 4, 1_000_000
    offsets, choice_of_row, row_of_choice = triton_dispatch.dispatch(experts, 4)
    assert row_of_choice[7, 1] == -1 and row_of_choice[9, 0] == -1
    assert offsets[-1] == 98 and (choice_of_row[98:] == -1).all() and (choice_of_row[:98] >= 0).all()


def test_a_token_whose_experts_do_not_exist_adds_nothing_to_the_capacity():
    experts = torch.zeros(8, 2, dtype=torch.int32)
    experts[:4] = 2
    experts[4] = torch.tensor([0, 9])
    offsets, *_ = assert_follows_oracle(experts, 2, 0.5)
    assert offsets.tolist() == [0, 2, 2]  # 0.5 * 2 * 4 / 2 rows


def test_strided_arguments_are_read_as_they_are_indexed():
    experts, mask = random_experts(60, 4, 2).T.contiguous().T, (torch.arange(120) % 3 > 0)[::2]
    assert not experts.is_contiguous()
    assert_follows_oracle(experts, 4, 1.0, torch.rand(120, generator=seeded(1))[::2], mask)
