"""What a launch computes on the host, and what the interpreter cannot compute."""

import pytest
import torch
import triton
from moe_cases import Shape, make_experts, randn, route

from clipup_kernels.triton import expert_mlp, expert_mlp_backward, grouped_linear, router_logits, rows
from clipup_kernels.triton.launch import ceil_div, power_of_two

pytestmark = pytest.mark.interpreter


def test_bfloat16_is_refused_because_the_interpreter_is_silently_wrong():
    shape, dtype = Shape(9, 16, 16, 2, 2), torch.bfloat16
    gates, plan = route(shape)
    x, experts = randn(9, 16, dtype=dtype), make_experts(shape, dtype)
    permuted, z = x.repeat(2, 1), randn(18, 16, dtype=dtype)
    fields = (*plan, *experts[:4], *experts[5:])
    for launch in (
        lambda: router_logits.router_logits(x, randn(2, 16)),
        lambda: rows.permute(x, *plan),
        lambda: rows.combine(permuted, gates, *plan),
        lambda: grouped_linear.grouped_linear(permuted, experts.in_weight, None, plan.offsets),
        lambda: expert_mlp.expert_mlp_forward(x, gates, *fields, "gelu", True),
        lambda: expert_mlp_backward.expert_mlp_backward(x, x, gates, *fields, z, "gelu", [True] * 4),
    ):
        with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
            launch()


def test_division_and_powers_are_tritons():
    for number in (1, 2, 3, 7, 8, 9, 127, 128, 129, 50_000, 2**31 - 1):
        assert power_of_two(number) == triton.next_power_of_2(number)
        assert [ceil_div(number, divisor) for divisor in (1, 16, 128)] == [
            triton.cdiv(number, divisor) for divisor in (1, 16, 128)
        ]
    assert ceil_div(0, 16) == 0 and power_of_two(0) == 1
