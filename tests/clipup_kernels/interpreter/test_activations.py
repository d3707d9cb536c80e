"""The activations of the Triton kernels and their derivatives, interpreted."""

import pytest
import torch
import triton
import triton.language as tl
from moe_cases import randn

from clipup_kernels import ACTIVATIONS, reference
from clipup_kernels.triton.activations import activate, activate_with_slope

pytestmark = pytest.mark.interpreter


@triton.jit
def _apply(z, a, slope, alone, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    place = tl.arange(0, SIZE)
    value, derivative = activate_with_slope(tl.load(z + place), ACTIVATION)
    tl.store(a + place, value)
    tl.store(slope + place, derivative)
    tl.store(alone + place, activate(tl.load(z + place), ACTIVATION))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_derivatives_follow_float64_and_stay_finite(activation):
    extreme = torch.tensor([-6e4, -1e3, -100.0, -0.0, 0.0, 100.0, 1e3, torch.nan])
    z = torch.cat([extreme, 3 * randn(2048)[8:], torch.linspace(-12, 12, 2048)])
    a, slope, alone = (torch.empty_like(z) for _ in range(3))
    _apply[(1,)](z, a, slope, alone, SIZE=len(z), ACTIVATION=activation)
    exact = z.double().requires_grad_()
    want = reference.activate(exact, activation)
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    assert torch.equal(a.nan_to_num(7), alone.nan_to_num(7)) and a[7].isnan()
    assert torch.equal(a[:3], torch.zeros(3)) and torch.equal(a[5:7], z[5:7])
    assert torch.equal(slope[:3], torch.zeros(3)) and torch.equal(slope[5:7], torch.ones(2))
    assert (a - want)[8:].abs().max() < 2e-6
    assert (slope - want_slope)[8:].abs().max() < 4e-6
