"""A tiny CLIP with a word-level tokenizer, and images whose features are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

import clipup

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
MODEL_CFG = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> nn.Module:
    """A tiny sparse CLIP."""
    torch.manual_seed(0)
    return clipup.upcycle(open_clip.CLIP(**MODEL_CFG), clipup.MoEConfig.clip_up(num_experts=4))


@pytest.fixture
def directory(model: nn.Module, tmp_path: Path) -> Path:
    """The tiny sparse CLIP, saved."""
    clipup.save_pretrained(model, tmp_path / "model", MODEL_CFG)
    return tmp_path / "model"


@pytest.fixture
def tokenizer() -> Callable:
    return open_clip.SimpleTokenizer(context_length=16)


class Oracle(nn.Module):
    """A perfect model: an image is one of 8 numbers, the value of all its pixels, and a text contains the number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 8).float() * self.scale

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return nn.functional.one_hot(tokens[:, 0], 8).float() * self.scale

    def forward(self, image: torch.Tensor | None = None, text: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What open_clip 4 calls to classify."""
        found = {} if image is None else {"image_features": self.encode_image(image)}
        return found if text is None else {**found, "text_features": self.encode_text(text)}


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def number_tokenizer() -> Callable:
    """A text holds one number."""
    return lambda texts: torch.tensor([[int(re.search(r"\d+", text).group())] for text in texts])


@pytest.fixture
def number_image() -> Callable:
    return lambda number: torch.full((3, 2, 2), float(number))
