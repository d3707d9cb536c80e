"""Captions as fixed vectors instead of a text tower, so that only the image tower learns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .sentence_encoder import SentenceEncoder, Tokenize

FILE = "vectors.safetensors"
_BATCH = 64


class FixedTexts(nn.Module):
    """The text tower of an open_clip ``CustomTextCLIP``: rows of a table, [B, 1] -> [B, D], without parameters."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.vocab_size = len(vectors)

    def forward(self, rows: Tensor) -> Tensor:
        return self.vectors[rows[:, 0]]


def embed(texts: Sequence[str], encoder: SentenceEncoder, tokenize: Tokenize) -> Tensor:
    """The embeddings of texts [N, D], minus their mean."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # batches of like lengths
    vectors = torch.empty(len(texts), encoder.bert.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            vectors[batch] = encoder(**tokenize([texts[row] for row in batch]))
    return vectors - vectors.mean(0)


def save(directory: Path, texts: Sequence[str], vectors: Tensor) -> None:
    """Writes texts and their vectors [N, D]."""
    save_file({"vectors": vectors}, directory / FILE, {"texts": json.dumps(list(texts))})


def read(directory: Path) -> tuple[Tensor, Callable[[str | Sequence[str]], Tensor]] | None:
    """The vectors of a data set and its tokenizer, from texts to rows [B, 1]; None if its captions are not fixed."""
    if not (directory / FILE).is_file():
        return None
    with safe_open(directory / FILE, "pt") as file:
        vectors, texts = file.get_tensor("vectors"), json.loads(file.metadata()["texts"])
    row_of = {text: row for row, text in enumerate(texts)}

    def tokenize(captions: str | Sequence[str]) -> Tensor:
        captions = [captions] if isinstance(captions, str) else captions
        return torch.tensor([[row_of[caption]] for caption in captions])

    return vectors, tokenize
