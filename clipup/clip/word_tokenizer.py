"""A tokenizer for short captions of few words: every word of a fixed vocabulary is one token.

The vocabulary is a text file with one word a line. A model asks for it in its config, where open_clip names the
tokenizers of Hugging Face: ``"text_cfg": {"hf_tokenizer_name": "words:icons", ...}``. ``clipup.get_tokenizer`` reads
the file from the model's directory (``vocabulary.txt``, which ``save_pretrained`` puts there), else out of this package
(``vocabularies/icons.txt``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "words:"
"""What the name of a vocabulary begins with in a model's config."""
FILE_NAME = "vocabulary.txt"
_VOCABULARIES = Path(__file__).parent / "vocabularies"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PADDING, _START, _UNKNOWN = range(3)
_SPECIAL = 4  # padding, start, unknown; and the end of the text behind all words


class WordTokenizer:
    """Texts to token ids, as open_clip's tokenizers: start of text, words, end of text, padding (0).

    The end of the text has the largest id, since open_clip's text tower pools at the largest. Words outside of the
    vocabulary share one id. What is longer than the context loses its last words, not its end.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        """
        Raises:
            ValueError: a word that is empty, no single lower-case word, or there twice; less than 3 tokens of context.
        """
        for word in words:
            if split_words(word) != [word]:
                raise ValueError(f"words: {word!r} is no single word of lower-case letters and digits")
        if len(set(words)) < len(words):
            twice = Counter(words).most_common(1)[0][0]
            raise ValueError(f"words: {twice!r} is there more than once")
        if context_length < 3:
            raise ValueError(f"context_length: got {context_length}, expected at least 3 (start, a word, end)")
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
        """The words of one text's ids; "?" for a word that was not known."""
        found = [int(token) - _UNKNOWN for token in tokens if _UNKNOWN <= int(token) < self.end_of_text]
        return " ".join(self.words[row - 1] if row else "?" for row in found)


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def count_vocabulary(captions: Iterable[str], at_least: int) -> list[str]:
    """Words of captions that occur `at_least` times, the most frequent first, equally frequent ones by the alphabet."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    frequent = [word for word, count in counts.items() if count >= at_least]
    return sorted(frequent, key=lambda word: (-counts[word], word))


def read_vocabulary(name: str, directory: Path | None = None) -> list[str]:
    """The words of a vocabulary by the name in a config ("words:icons"), from a model's directory or this package.

    Raises:
        FileNotFoundError: neither has it.
        ValueError: the name is a path, or the file is not UTF-8 text.
    """
    return _text(_file(name, directory)).split()


def is_asked_for(text_cfg: dict) -> bool:
    """Whether a model's ``text_cfg`` names a vocabulary of words as its tokenizer."""
    name = text_cfg.get("hf_tokenizer_name")
    return isinstance(name, str) and name.startswith(PREFIX)


def of_config(text_cfg: dict, directory: Path | None = None, context_length: int | None = None) -> WordTokenizer:
    """The tokenizer that a model's ``text_cfg`` asks for.

    Raises:
        FileNotFoundError: its vocabulary is missing.
        ValueError: the vocabulary is of another size than the model's.
    """
    words = read_vocabulary(text_cfg["hf_tokenizer_name"], directory)
    tokenizer = WordTokenizer(words, context_length or text_cfg["context_length"])
    if tokenizer.vocab_size != text_cfg["vocab_size"]:
        raise ValueError(
            f"the vocabulary {text_cfg['hf_tokenizer_name']} makes {tokenizer.vocab_size} tokens, but the model has "
            f"{text_cfg['vocab_size']} (vocab_size): put back the vocabulary that it was trained with"
        )
    return tokenizer


def vocabulary_text(text_cfg: dict) -> str | None:
    """The file that belongs into the directory of a model with this config; None for other tokenizers."""
    return _text(_file(text_cfg["hf_tokenizer_name"], None)) if is_asked_for(text_cfg) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the vocabulary {path} is not UTF-8 text: {error}") from error


def _file(name: str, directory: Path | None) -> Path:
    bare = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(bare):
        raise ValueError(
            f"hf_tokenizer_name: {name!r} names no vocabulary, expected {PREFIX} and letters, digits, - and _: a "
            "config must not lead to other files"
        )
    shipped = _VOCABULARIES / f"{bare}.txt"
    beside = [] if directory is None else [directory / FILE_NAME]
    for path in (*beside, shipped):
        if path.is_file():
            return path
    looked = " nor ".join(str(path) for path in (*beside, shipped))
    raise FileNotFoundError(
        f"the vocabulary {name} is neither {looked}: install the version of clipup that the model was made with"
    )
