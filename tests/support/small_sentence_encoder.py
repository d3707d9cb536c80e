"""A stand-in for the package that carries a sentence encoder: tiny and random, with the same files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from zipfile import ZipFile

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel

from studies import sentence_encoder

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "bird", "small", "tree", "of", "stone"]


def write_wheel(path: Path, monkeypatch) -> Path:
    """Writes the package, whose checksum is then the expected one. It cuts texts at six tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    words.enable_truncation(4)
    words.enable_padding(length=4)  # as in the package: the tokenizer alone would cut and fill otherwise
    files = {
        "config.json": config.to_json_string(),
        "model.safetensors": save(BertModel(config).state_dict()),
        "tokenizer.json": words.to_str(),
        "sentence_bert_config.json": json.dumps({"max_seq_length": 6}),
    }
    with ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{sentence_encoder.FOLDER}/{name}", content)
    monkeypatch.setattr(sentence_encoder, "CHECKSUM", hashlib.sha256(path.read_bytes()).hexdigest())
    return path
