"""The captions of a study's splits: how many were trained on, have unknown words, or cannot be told apart.

    python benchmarks/study_captions.py icons --csv studies/icons/captions.csv

Reads captions alone, no image. Per cent of a split's distinct captions, but for ``images_trained``, which is of its
images.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from harness import run

from clipup.clip.word_tokenizer import WordTokenizer, split_words
from clipup.data.shard_names import expand_shards
from clipup.data.shards import tar_samples
from clipup.data.skips import Skips
from clipup.demo.pictograms.captions import same_words
from clipup.models.tokenizers import get_tokenizer

COLUMNS = (
    "split images captions images_trained captions_trained captions_unknown_word captions_same_tokens "
    "captions_same_words"
)
TRAIN, SPLITS = "train", ("test_styles", "test_names", "validation")


def captions(data: Path, split: str) -> list[str]:
    """The first caption of every image."""
    shards = expand_shards(data / f"{split}-*.tar", "data")
    return [record.captions[0] for record in tar_samples(shards, Skips(), "data")]


def row(split: str, texts: list[str], trained: set[str], tokenizer: WordTokenizer) -> dict[str, str]:
    distinct = sorted(set(texts))
    vocabulary = set(tokenizer.words)
    alike_in_tokens = Counter(tuple(tokens.tolist()) for tokens in tokenizer(distinct))
    alike_in_words = Counter(map(same_words, distinct))
    shares = {
        "images_trained": share(texts, (text in trained for text in texts)),
        "captions_trained": share(distinct, (text in trained for text in distinct)),
        "captions_unknown_word": share(distinct, (not vocabulary.issuperset(split_words(text)) for text in distinct)),
        "captions_same_tokens": share(distinct, (count for count in alike_in_tokens.values() if count > 1)),
        "captions_same_words": share(distinct, (count for count in alike_in_words.values() if count > 1)),
    }
    return {"split": split, "images": str(len(texts)), "captions": str(len(distinct)), **shares}


def share(of: list[str], counts: Iterable[int]) -> str:
    return f"{100 * sum(counts) / len(of):.1f}"


def measure(args: argparse.Namespace) -> list[dict[str, str]]:
    tokenizer, trained = get_tokenizer(args.model), set(captions(args.data, TRAIN))
    return [row(split, captions(args.data, split), trained, tokenizer) for split in SPLITS]


def main(argv: list[str] | None = None) -> int:
    options = {
        "data": {"type": Path, "help": "data set made by `python -m studies icons`"},
        "--model": {"default": "clipup-icons-w64", "help": "whose words are known (default: %(default)s)"},
    }
    return run(argv, __doc__, options, measure, COLUMNS)


if __name__ == "__main__":
    raise SystemExit(main())
