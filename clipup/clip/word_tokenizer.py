"""A word-level tokenizer for short captions: each word of a fixed vocabulary is one token.

The vocabulary is a text file with one word per line. A model config names it in the field for Hugging Face tokenizers:
``"text_cfg": {"hf_tokenizer_name": "words:icons", ...}``. ``clipup.get_tokenizer`` reads the file from the model's
directory (``vocabulary.txt``, written by ``save_pretrained``), else from this package (``vocabularies/icons.txt``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "words:"
"""Prefix of a vocabulary's name in a model config."""
FILE_NAME = "vocabulary.txt"
_VOCABULARIES = Path(__file__).parent / "vocabularies"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CONTEXT_LENGTH, _VOCAB_SIZE = 77, 49408  # open_clip's defaults
_PADDING, _START, _UNKNOWN = range(3)
_SPECIAL = 4  # padding, start, unknown; and end of text, whose id follows those of all words


class WordTokenizer:
    """Converts texts to token ids like open_clip's tokenizers: start of text, words, end of text, padding (0).

    End of text has the largest id, because open_clip's text tower pools at the largest id. Words outside the vocabulary
    share one id. Longer texts are truncated, but keep their end-of-text token.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        """
        Raises:
            ValueError: a word is not a single lower-case word or is duplicated, or ``context_length`` is below 3.
        """
        for word in words:
            if split_words(word) != [word]:
                raise ValueError(f"words: {word!r} is not a single word of lower-case letters and digits")
        if len(set(words)) < len(words):
            raise ValueError(f"words: {Counter(words).most_common(1)[0][0]!r} is duplicated")
        if not isinstance(context_length, int) or context_length < 3:
            raise ValueError(f"context_length: got {context_length!r}, expected at least 3 (start, a word, end)")
        self.words = tuple(words)
        self.context_length = context_length
        self.vocab_size = len(words) + _SPECIAL
        self.end_of_text = self.vocab_size - 1
        self._ids = {word: _UNKNOWN + 1 + row for row, word in enumerate(words)}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 [N, context_length]."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        tokens = torch.full((len(texts), length), _PADDING, dtype=torch.long)
        for row, text in enumerate(texts):
            ids = [_START, *(self._ids.get(word, _UNKNOWN) for word in split_words(text))][: length - 1]
            tokens[row, : len(ids) + 1] = torch.tensor([*ids, self.end_of_text])
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The words of one text's token ids, "?" for unknown words."""
        rows = [int(token) - _UNKNOWN for token in tokens if _UNKNOWN <= int(token) < self.end_of_text]
        return " ".join(self.words[row - 1] if row else "?" for row in rows)


def split_words(text: str) -> list[str]:
    """The words of a text: sequences of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def count_vocabulary(captions: Iterable[str], at_least: int) -> list[str]:
    """The words that occur at least ``at_least`` times in captions, by decreasing frequency, then alphabetically."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    frequent = [word for word, count in counts.items() if count >= at_least]
    return sorted(frequent, key=lambda word: (-counts[word], word))


def uses_words(text_cfg: dict) -> bool:
    """Whether a model's ``text_cfg`` names a word vocabulary as its tokenizer."""
    name = text_cfg.get("hf_tokenizer_name")
    return isinstance(name, str) and name.startswith(PREFIX)


def from_text(vocabulary: str, text_cfg: dict, context_length: int | None = None) -> WordTokenizer:
    """The tokenizer for a model's ``text_cfg``, from the content of its vocabulary's file (``vocabulary_text``).

    Raises:
        ValueError: the vocabulary does not have the model's vocabulary size.
    """
    length = text_cfg.get("context_length", _CONTEXT_LENGTH) if context_length is None else context_length
    tokenizer = WordTokenizer(vocabulary.split(), length)
    if tokenizer.vocab_size != text_cfg.get("vocab_size", _VOCAB_SIZE):
        raise ValueError(
            f"the vocabulary {text_cfg['hf_tokenizer_name']} has {tokenizer.vocab_size} tokens, but the model has "
            f"vocab_size={text_cfg.get('vocab_size', _VOCAB_SIZE)}; restore the vocabulary that it was trained with"
        )
    return tokenizer


def vocabulary_text(name: str, directory: Path | None = None) -> str:
    """The words of the vocabulary that a config names ("words:icons"), from a model's directory or this package.

    Raises:
        FileNotFoundError: found in neither.
        ValueError: the name is not valid (it could be a path), or the file is not UTF-8 text.
    """
    bare = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(bare):
        raise ValueError(
            f"hf_tokenizer_name: {name!r} is not a vocabulary name, expected {PREFIX} followed by letters, digits, "
            "- or _ (a config must not refer to other files)"
        )
    shipped = _VOCABULARIES / f"{bare}.txt"
    candidates = [shipped] if directory is None else [directory / FILE_NAME, shipped]
    for path in candidates:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"the vocabulary {name} was not found as {' or '.join(map(str, candidates))}; install the clipup "
        "version that the model was made with"
    )
