"""A tiny CLIP, tiny data, and options that write into a temporary directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipup
from clipup.train import TrainOptions

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


class Pairs:
    """Image-text pairs in memory. Their order, and noise on the images, come from torch's own generator."""

    def __init__(self, pairs: int = 24, batch_size: int = 8, noise: float = 0.1, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(pairs, 3, 16, 16, generator=generator)
        self.texts = torch.zeros(pairs, 8, dtype=torch.long)
        for row in range(pairs):
            end = 2 + row % 6
            self.texts[row, :end] = torch.randint(1, 1000, (end,), generator=generator)
            self.texts[row, end] = 49407
        self.batch_size, self.noise = batch_size, noise

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.images)).split(self.batch_size)[: len(self)]:
            yield self.images[rows] + self.noise * torch.randn(len(rows), 3, 16, 16), self.texts[rows]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pairs() -> type[Pairs]:
    return Pairs


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """A tiny CLIP, the same for the same seed; sparse when a config is given."""

    def make(moe: clipup.MoEConfig | None = None, seed: int = 0, **kwargs: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = open_clip.CLIP(**MODEL_CFG, output_dict=True, **kwargs)
        return model if moe is None else clipup.upcycle(model, moe)

    return make


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., TrainOptions]:
    """Options of a short run on the CPU; keywords change them."""

    def make(**changes: Any) -> TrainOptions:
        usual = {"device": "cpu", "logs": str(tmp_path / "logs"), "name": "run", "steps": 6, "lr": 1e-3, "warmup": 2}
        return TrainOptions(**{**usual, **changes})

    return make


@pytest.fixture
def named_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny CLIP as a name that open_clip knows."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", MODEL_CFG)
    return "tiny"


@pytest.fixture
def model_directory(make_model: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """A saved dense model."""
    directory = tmp_path / "dense"
    clipup.save_pretrained(make_model(), directory, MODEL_CFG)
    return directory


@pytest.fixture
def csv_data(tmp_path: Path) -> Path:
    """24 pictures of flat colours with captions, as a CSV file."""
    from PIL import Image

    rows = ["filepath\ttitle"]
    for index in range(24):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (20, 20), (10 * index, 255 - 10 * index, 7 * index)).save(path)
        rows.append(f"{path}\tcolour number {index}")
    file = tmp_path / "train.csv"
    file.write_text("\n".join(rows) + "\n")
    return file
