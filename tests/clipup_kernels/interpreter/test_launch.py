"""What a launch computes on the host."""

import pytest
import torch
import triton

from clipup_kernels.triton.launch import ceil_div, dense, power_of_two

pytestmark = pytest.mark.interpreter


def test_division_and_powers_are_tritons():
    for number in (1, 2, 3, 7, 8, 9, 127, 128, 129, 50_000, 2**31 - 1):
        assert power_of_two(number) == triton.next_power_of_2(number)
        assert [ceil_div(number, divisor) for divisor in (1, 16, 128)] == [
            triton.cdiv(number, divisor) for divisor in (1, 16, 128)
        ]
    assert ceil_div(0, 16) == 0 and power_of_two(0) == 1


def test_tensors_become_contiguous_and_masks_bytes():
    x, mask = torch.randn(4, 6).T, torch.tensor([True, False])
    rows, flags, nothing = dense(x, mask, None)
    assert rows.is_contiguous() and torch.equal(rows, x) and nothing is None
    assert flags.dtype == torch.uint8 and flags.tolist() == [1, 0]
