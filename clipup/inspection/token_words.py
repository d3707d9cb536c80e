"""Tokens of a caption as text, and the words that each expert takes most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import open_clip

from ..clip.word_tokenizer import WordTokenizer
from .routing_trace import LayerRouting

PADDING = -1
"""Word index of padding."""
_STARTS_WORD = ("\u2581", "\u0120")  # marks the first piece of a word in SentencePiece and byte-level BPE
_CONTINUES_WORD = "##"  # marks the other pieces in WordPiece
_ENDS_WORD = "</w>"  # marks the last piece in open_clip's BPE


class Piece(NamedTuple):
    """One token as text."""

    text: str
    """The characters completed by the token; empty if it holds only the first bytes of a character."""
    word: int
    """Index of the token's word in its caption; -1 for padding."""


class WordShare(NamedTuple):
    """How often an expert was the first choice of a word's tokens."""

    word: str
    taken: int
    seen: int
    """Tokens of the word in all captions."""


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[Piece]:
    """A text's tokens as text, [S] ids -> S pieces. Special tokens are in angle brackets, padding is empty.

    Raises:
        TypeError: the tokenizer is not of a kind that ``clipup.get_tokenizer`` returns.
    """
    ids = [int(token) for token in tokens]
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return _simple_pieces(tokenizer, ids)
    if isinstance(tokenizer, WordTokenizer):
        return _word_pieces(tokenizer, ids)
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "convert_ids_to_tokens"):
        return _hugging_face_pieces(inner, ids)
    raise TypeError(f"tokenizer must be one from clipup.get_tokenizer, got a {type(tokenizer).__name__}")


def words(caption: Sequence[Piece]) -> list[str]:
    """The whole word of every token, [S]; empty for padding."""
    whole: dict[int, str] = {}
    for piece in caption:
        whole[piece.word] = whole.get(piece.word, "") + piece.text
    return [whole[piece.word] if piece.word != PADDING else "" for piece in caption]


def expert_words(layer: LayerRouting, captions: Sequence[Sequence[Piece]], count: int) -> list[list[WordShare]]:
    """For each expert the ``count`` words that it is chosen for most, beyond what its load explains.

    Ranked by ``taken - seen * s``, where s is the expert's share of all tokens: how many more of the word's tokens it
    took than at the same share of every word. Words it took fewer tokens of are omitted.
    """
    counts: dict[str, np.ndarray] = {}
    for sample, caption in enumerate(captions):
        for token, word in enumerate(words(caption)):
            if word and layer.mask[sample, token]:
                expert = layer.expert_indices[sample, token, 0]  # -1, no expert, is counted in the last place
                counts.setdefault(word, np.zeros(layer.num_experts + 1, dtype=int))[expert] += 1
    total = sum(counts.values(), np.zeros(layer.num_experts + 1, dtype=int))
    shares = total / max(1, total.sum())
    ranked = []
    for expert in range(layer.num_experts):
        excess = {word: taken[expert] - taken.sum() * shares[expert] for word, taken in counts.items()}
        best = sorted((word for word in excess if excess[word] > 0), key=lambda word: (-excess[word], word))[:count]
        ranked.append([WordShare(word, int(counts[word][expert]), int(counts[word].sum())) for word in best])
    return ranked


def _simple_pieces(tokenizer: open_clip.SimpleTokenizer, ids: list[int]) -> list[Piece]:
    def spelled(of_word: list[str]) -> str:
        letters = "".join(of_word).removesuffix(_ENDS_WORD)
        return bytes(map(tokenizer.byte_decoder.get, letters)).decode("utf-8", "replace").rstrip("\ufffd")

    end = ids.index(tokenizer.eot_token_id) + 1
    raw = [tokenizer.decoder[token] for token in ids[:end]]
    special = [token in tokenizer.all_special_ids for token in ids[:end]]
    continues = [not previous.endswith(_ENDS_WORD) for previous in ["", *raw[:-1]]]
    return _joined(zip(raw, special, continues, strict=True), spelled) + [Piece("", PADDING)] * (len(ids) - end)


def _word_pieces(tokenizer: WordTokenizer, ids: list[int]) -> list[Piece]:
    """Start, words, end and padding, one token each."""
    end = ids.index(tokenizer.end_of_text)
    decoded = [tokenizer.decode([token]) for token in ids[1:end]]
    names = [_special("start"), *(_special("unknown") if word == "?" else word for word in decoded), _special("end")]
    return [Piece(name, word) for word, name in enumerate(names)] + [Piece("", PADDING)] * (len(ids) - end - 1)


def _hugging_face_pieces(inner: Any, ids: list[int]) -> list[Piece]:
    def spelled(of_word: list[str]) -> str:
        return inner.convert_tokens_to_string(of_word).strip().rstrip("\ufffd") if of_word else ""

    raw = inner.convert_ids_to_tokens(ids)
    special = [token in inner.all_special_tokens for token in raw]
    continues = [token.startswith(_CONTINUES_WORD) for token in raw]
    if any(token.startswith(_STARTS_WORD) for token in raw):
        continues = [not token.startswith(_STARTS_WORD) for token in raw]
    joined = _joined(zip(raw, special, continues, strict=True), spelled)
    return [Piece("", PADDING) if token == inner.pad_token else piece for token, piece in zip(raw, joined, strict=True)]


def _joined(tokens: Iterable[tuple[str, bool, bool]], spelled: Callable[[list[str]], str]) -> list[Piece]:
    """Pieces of (token, whether it is special, whether it continues a word). ``spelled`` gives the characters of a
    word's tokens, without an incomplete last character."""
    joined, word, of_word = [], -1, list[str]()
    for raw, is_special, continues in tokens:
        if is_special or not (of_word and continues):
            word, of_word = word + 1, []
        start, of_word = len(spelled(of_word)), [] if is_special else [*of_word, raw]
        joined.append(Piece(_special(raw) if is_special else spelled(of_word)[start:], word))
    return joined


def _special(name: str) -> str:
    return f"\u27e8{name.strip('<>[]/').removesuffix('_of_text')}\u27e9"
