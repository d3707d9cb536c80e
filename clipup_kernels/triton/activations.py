"""Activations and their derivatives in float32, elementwise: epilogues apply them to a tile of sums.

Each of them but relu is z times a distribution function: the normal one for ``gelu``, a logistic one for the others
(``gelu_tanh`` included, since (1 + tanh u) / 2 = sigmoid(2 u)).

Epilogues are bound by the number of instructions. So value and slope share one exponential, which is of base 2, and
reciprocals are square roots: ``tl.exp``, a division and erf handle ranges that do not occur here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reciprocal(u):
    """1 / u for u >= 1, infinity included, with a relative error of 2e-7: one instruction and a product."""
    return tl.rsqrt(u * u)


@triton.jit
def _logistic(z):
    """``sigmoid(z)``."""
    return _reciprocal(1 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def activate_with_slope(z, ACTIVATION: tl.constexpr):
    """``activation(z)`` and ``activation'(z)``, both float32, for float32 z and every name in ``ACTIVATIONS``."""
    if ACTIVATION == "gelu":
        # The tail of the normal distribution by its density (Abramowitz and Stegun, 26.2.17), with an error of 8e-8.
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        t = _reciprocal(1 + 0.2316419 * tl.abs(z))
        terms = 0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429)))
        tail = density * t * terms
        share = tl.where(z < 0, tail, 1 - tail)
        a = z * share
        slope = share + z * density
    elif ACTIVATION == "gelu_tanh":  # 2 sqrt(2 / pi) (z + 0.044715 z^3)
        square = z * z
        share = _logistic(z * (1.5957691216057308 + 0.07135481627260025 * square))
        a = z * share
        slope = share + a * (1 - share) * (1.5957691216057308 + 0.21406444881780075 * square)
    elif ACTIVATION == "quick_gelu":
        share = _logistic(1.702 * z)
        a = z * share
        slope = share + 1.702 * a * (1 - share)
    elif ACTIVATION == "silu":
        share = _logistic(z)
        a = z * share
        slope = share + a * (1 - share)
    else:
        tl.static_assert(ACTIVATION == "relu", "no kernel for this activation")
        a = tl.where(z < 0, 0.0, z)
        slope = tl.where(z > 0, 1.0, 0.0)
    return a, slope


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """``activation(z)``; the compiler drops the unused slope."""
    a, _ = activate_with_slope(z, ACTIVATION)
    return a
