"""A tiny CLIP, tiny data, and options that write into a temporary directory."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import clipup
from clipup.train import Every, TrainOptions, TrainResult, train

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
"""Most of the parameters, and of the time of a short run, are the embeddings of open_clip's vocabulary."""

TOKENIZER = open_clip.SimpleTokenizer(context_length=8)


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
        return TrainOptions.flat(**{**usual, **changes})

    return make


@pytest.fixture
def run(
    make_model: Callable[..., nn.Module], pairs: type[Pairs], options: Callable[..., TrainOptions]
) -> Callable[..., TrainResult]:
    """Three epochs of three steps each, or so many steps; of pairs in memory, or of ``train_data``."""
    transforms = tuple(open_clip.image_transform(16, is_train=training) for training in (True, False))

    def run(
        callbacks: Sequence[Every] = (), sparse: clipup.MoEConfig | None = None, loader: Any = None, **changes: Any
    ) -> TrainResult:
        settings = options(**{"steps": None, "epochs": 3, **changes})
        return train(
            settings,
            model=make_model(sparse).to(torch.bfloat16 if settings.speed.precision == "bf16" else torch.float32),
            preprocess=transforms,
            tokenizer=TOKENIZER,
            loader=loader or (pairs() if settings.data.train_data is None else None),
            callbacks=callbacks,
        )

    return run


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
def pictures(tmp_path: Path) -> dict[Path, str]:
    """24 pictures of two colours with captions."""
    captions = {}
    for index in range(24):
        picture = Image.new("RGB", (20, 20), (10 * index, 255 - 10 * index, 7 * index))
        picture.paste((255, 255, 255), (0, 0, 10, 10))
        picture.save(tmp_path / f"{index}.png")
        captions[tmp_path / f"{index}.png"] = f"colour number {index}"
    return captions


@pytest.fixture
def csv_data(pictures: dict[Path, str], tmp_path: Path) -> str:
    """The pictures as a CSV file."""
    rows = [f"{path}\t{caption}" for path, caption in pictures.items()]
    (tmp_path / "train.csv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return str(tmp_path / "train.csv")


@pytest.fixture
def shards(pictures: dict[Path, str], tmp_path: Path) -> str:
    """The pictures as two WebDataset shards."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for path, caption in list(pictures.items())[shard::2]:
                tar.add(path, path.name)
                path.with_suffix(".txt").write_text(caption)
                tar.add(path.with_suffix(".txt"), f"{path.stem}.txt")
    return str(tmp_path / "train-{0..1}.tar")
