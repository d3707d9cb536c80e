"""Activations and their derivatives in float32, elementwise: epilogues apply them to a tile of sums.

Each of them but relu is z times a distribution function: the normal one for ``gelu``, a logistic one for the others
(``gelu_tanh`` included, since (1 + tanh u) / 2 = sigmoid(2 u)).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate_with_slope(z, ACTIVATION: tl.constexpr):
    """``activation(z)`` and ``activation'(z)``, both float32, for float32 z and every name in ``ACTIVATIONS``."""
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * z)
        a = z * share
        slope = share + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == "gelu_tanh":  # 2 sqrt(2 / pi) (z + 0.044715 z^3)
        square = z * z
        share = tl.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * square))
        a = z * share
        slope = share + a * (1 - share) * (1.5957691216057308 + 0.21406444881780075 * square)
    elif ACTIVATION == "quick_gelu":
        share = tl.sigmoid(1.702 * z)
        a = z * share
        slope = share + 1.702 * a * (1 - share)
    elif ACTIVATION == "silu":
        share = tl.sigmoid(z)
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
