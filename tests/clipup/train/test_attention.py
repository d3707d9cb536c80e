"""Attention over short sequences in bfloat16 on a CPU uses plain matrix products; otherwise torch chooses."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipup.train.forward import SHORT, attention_kernel
from clipup.train.objectives import ContrastiveObjective
from clipup.train.step import TrainStep


class Flash(TorchDispatchMode):
    """Counts calls of the flash kernel, forward and backward."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "flash_attention" in str(function)
        return function(*args, **(kwargs or {}))


def clip(image_size: int = 16, context_length: int = 8) -> open_clip.CLIP:
    vision = {"image_size": image_size, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": context_length, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision, text, output_dict=True)


def flash_calls(model: open_clip.CLIP, precision: str) -> int:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    step = TrainStep(model, ContrastiveObjective(), optimizer, torch.device("cpu"), precision)
    images = torch.randn(4, 3, *model.visual.image_size)
    texts = torch.randint(1, 49, (4, model.context_length))
    with Flash() as flash:
        step([(images, texts)])
    return flash.calls


@pytest.mark.parametrize(
    ("precision", "sizes", "expected"),
    [
        ("amp_bf16", {}, 0),
        ("fp32", {}, 8),  # forward and backward of two layers in two towers
        ("amp_bf16", {"image_size": 64}, 8),
        ("amp_bf16", {"context_length": SHORT + 1}, 8),
    ],
)
def test_only_a_step_in_bfloat16_with_short_sequences_leaves_the_flash_kernel(precision, sizes, expected):
    assert flash_calls(clip(**sizes), precision) == expected


def test_towers_of_unknown_length_keep_torchs_choice():
    with attention_kernel(torch.nn.Linear(2, 2), torch.device("cpu"), "amp_bf16"):
        assert torch.backends.cuda.flash_sdp_enabled()
