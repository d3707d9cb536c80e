"""``expert_glu`` by a backend's ``expert_mlp``: gate and projection are the halves of one weight [E, 2H, D].

For backends whose ``expert_mlp`` reads such halves in place, and writes their gradients side by side by a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def forward_of(expert_mlp_forward: Callable) -> Callable:
    def expert_glu_forward(
        x, gates, offsets, choice_of_row, row_of_choice, gate_in_weight, out_weight, activation, keep_z
    ) -> tuple[Tensor, Tensor]:
        gate_weight, in_weight = gate_in_weight.chunk(2, dim=1)
        experts = in_weight, None, out_weight, None, gate_weight, None
        return expert_mlp_forward(x, gates, offsets, choice_of_row, row_of_choice, *experts, activation, keep_z)

    return expert_glu_forward


def backward_of(expert_mlp_backward: Callable) -> Callable:
    def expert_glu_backward(
        dy, x, gates, offsets, choice_of_row, row_of_choice, gate_in_weight, out_weight, z, activation, output_mask
    ) -> tuple[Tensor, ...]:
        gate_weight, in_weight = gate_in_weight.chunk(2, dim=1)
        experts = in_weight, None, out_weight, None, gate_weight, None
        routing = offsets, choice_of_row, row_of_choice
        d_x, d_gates, d_in, _, d_out, _, d_gate, _ = expert_mlp_backward(
            dy, x, gates, *routing, *experts, z, activation, output_mask
        )
        return d_x, d_gates, torch.cat((d_gate, d_in), dim=1) if output_mask[2] else d_in, d_out

    return expert_glu_backward
