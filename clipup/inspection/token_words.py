"""Tokens of a caption as text, and the words that each expert takes most."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
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
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return _of_simple(tokenizer, tokens)
    if isinstance(tokenizer, WordTokenizer):
        return _of_words(tokenizer, tokens)
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "convert_ids_to_tokens"):
        return _of_hugging_face(inner, tokens)
    raise TypeError(f"tokenizer must be one from clipup.get_tokenizer, got a {type(tokenizer).__name__}")


def words(caption: Sequence[Piece]) -> list[str]:
    """The whole word of every token, [S]; empty for padding."""
    whole: dict[int, str] = {}
    for piece in caption:
        whole[piece.word] = whole.get(piece.word, "") + piece.text
    return [whole[piece.word] if piece.word != PADDING else "" for piece in caption]


def expert_words(layer: LayerRouting, captions: Sequence[Sequence[Piece]], count: int) -> list[list[WordShare]]:
    """For each expert the ``count`` words that it is chosen for most, beyond what its load explains.

    Ranked by ``taken - seen * s``, where s is the expert's share of all first choices: how many more of the word's
    tokens it took than at the same share of every word. Words it took fewer tokens of are omitted.
    """
    counts: dict[str, np.ndarray] = {}
    for sample, caption in enumerate(captions):
        for token, word in enumerate(words(caption)):
            expert = layer.expert_indices[sample, token, 0]
            if word and expert >= 0:
                counts.setdefault(word, np.zeros(layer.num_experts, dtype=int))[expert] += 1
    total = sum(counts.values(), np.zeros(layer.num_experts, dtype=int))
    shares = total / max(1, total.sum())
    found = []
    for expert in range(layer.num_experts):
        excess = {word: taken[expert] - taken.sum() * shares[expert] for word, taken in counts.items()}
        best = sorted((word for word in excess if excess[word] > 0), key=lambda word: (-excess[word], word))[:count]
        found.append([WordShare(word, int(counts[word][expert]), int(counts[word].sum())) for word in best])
    return found


def _of_simple(tokenizer: open_clip.SimpleTokenizer, tokens: Sequence[int]) -> list[Piece]:
    found, word, ended, decoder = [], 0, False, codecs.getincrementaldecoder("utf-8")("replace")
    for token in map(int, tokens):
        if ended:
            found.append(Piece("", PADDING))
            continue
        raw = tokenizer.decoder[token]
        if token in tokenizer.all_special_ids:
            found.append(Piece(_special(raw.replace("_of_text", "")), word))
            word += 1
            ended = token == tokenizer.eot_token_id
            continue
        is_last = raw.endswith(_ENDS_WORD)
        letters = bytes(tokenizer.byte_decoder[letter] for letter in raw.removesuffix(_ENDS_WORD))
        found.append(Piece(decoder.decode(letters, final=is_last), word))
        word += is_last
    return found


def _of_words(tokenizer: WordTokenizer, tokens: Sequence[int]) -> list[Piece]:
    """Start, words, end and padding, one token each."""
    end = list(tokens).index(tokenizer.end_of_text)
    names = [_special("start"), *(tokenizer.decode([token]) for token in tokens[1:end]), _special("end")]
    return [Piece(name, word) for word, name in enumerate(names)] + [Piece("", PADDING)] * (len(tokens) - end - 1)


def _of_hugging_face(inner: Any, tokens: Sequence[int]) -> list[Piece]:
    raw = inner.convert_ids_to_tokens([int(token) for token in tokens])
    marks_starts = any(token.startswith(_STARTS_WORD) for token in raw)
    found, word = [], -1
    of_word: list[str] = []
    for token in raw:
        if token == inner.pad_token:
            found.append(Piece("", PADDING))
            continue
        is_special = token in inner.all_special_tokens
        continues = not token.startswith(_STARTS_WORD) if marks_starts else token.startswith(_CONTINUES_WORD)
        if is_special or not of_word or not continues:
            word, of_word = word + 1, []
        if is_special:
            found.append(Piece(_special(token), word))
            continue
        before = _text(inner, of_word)
        of_word.append(token)
        found.append(Piece(_text(inner, of_word)[len(before) :], word))
    return found


def _text(inner: Any, of_word: list[str]) -> str:
    """The characters that the tokens of a word spell, without an incomplete last one."""
    return inner.convert_tokens_to_string(of_word).strip().rstrip("\ufffd") if of_word else ""


def _special(name: str) -> str:
    return f"\u27e8{name.strip('<>[]/')}\u27e9"
