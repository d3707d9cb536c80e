"""Attention over short sequences in bfloat16 on a CPU uses plain matrix products; otherwise torch chooses."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipup.train.forward import SHORT
from clipup.train.objectives import ContrastiveObjective
from clipup.train.step import TrainStep


class Flash(TorchDispatchMode):
    """Counts calls of the flash kernel, forward and backward."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "flash_attention" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "image_size", "context_length", "expected"),
    [
        ("amp_bf16", 16, 8, 0),
        ("fp32", 16, 8, 8),  # forward and backward of two layers in two towers
        ("amp_bf16", 64, 8, 8),
        ("amp_bf16", 16, SHORT + 1, 8),
    ],
)
def test_only_a_step_in_bfloat16_with_short_sequences_leaves_the_flash_kernel(
    precision, image_size, context_length, expected
):
    vision = {"image_size": image_size, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": context_length, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(16, vision, text, output_dict=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    step = TrainStep(model, ContrastiveObjective(), optimizer, torch.device("cpu"), precision)
    with Flash() as flash:
        step([(torch.randn(4, 3, image_size, image_size), torch.randint(1, 49, (4, context_length)))])
    assert flash.calls == expected
