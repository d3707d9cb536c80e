"""The tokenizer of whole words, by itself and as the tokenizer of a model that is saved and loaded."""

from __future__ import annotations

import copy
import json

import open_clip
import pytest
import torch

import clipup
from clipup.clip import word_tokenizer
from clipup.clip.word_tokenizer import WordTokenizer, count_vocabulary

WORDS = ["arrow", "left", "h1"]
MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {
        "hf_tokenizer_name": "words:test",
        "context_length": 6,
        "vocab_size": 7,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture
def tokenizer():
    return WordTokenizer(WORDS, context_length=6)


@pytest.fixture
def vocabularies(tmp_path, monkeypatch):
    """A directory in the place of the package's own, with the vocabulary of MODEL_CFG."""
    monkeypatch.setattr(word_tokenizer, "_VOCABULARIES", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "test.txt").write_text("\n".join(WORDS) + "\n")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "words", copy.deepcopy(MODEL_CFG))
    return tmp_path / "shipped"


def test_a_text_is_start_words_end_and_padding(tokenizer):
    tokens = tokenizer(["arrow left", "Arrow, H1", "arrow nowhere left", ""])

    assert tokens.tolist() == [
        [1, 3, 4, 6, 0, 0],
        [1, 3, 5, 6, 0, 0],
        [1, 3, 2, 4, 6, 0],
        [1, 6, 0, 0, 0, 0],
    ]
    assert tokens.dtype == torch.int64 and tokenizer.vocab_size == 7
    assert tokenizer("arrow left").tolist() == tokens[:1].tolist()


def test_a_long_text_loses_words_and_keeps_its_end(tokenizer):
    tokens = tokenizer(["left " * 20, "left " * 4])

    assert tokens.tolist() == [[1, 4, 4, 4, 4, 6]] * 2
    assert tokenizer(["left"], context_length=3).tolist() == [[1, 4, 6]]


def test_the_end_of_the_text_is_where_open_clip_pools(tokenizer):
    tokens = tokenizer(["arrow left", "h1", "unheard words"])

    assert tokens.argmax(1).tolist() == [3, 2, 3]


def test_known_words_come_back_and_unknown_ones_are_marked(tokenizer):
    assert tokenizer.decode(tokenizer("left Arrow nowhere h1")[0]) == "left arrow ? h1"


@pytest.mark.parametrize(
    "words, context_length, message",
    [
        (["arrow", "arrow"], 6, "'arrow' is there more than once"),
        (["arrow left"], 6, "'arrow left' is no single word"),
        (["Arrow"], 6, "no single word of lower-case"),
        (["arrow"], 2, "context_length: got 2"),
    ],
)
def test_a_vocabulary_that_could_not_be_found_again_is_refused(words, context_length, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(words, context_length)


def test_a_vocabulary_holds_frequent_words_in_one_order():
    captions = ["arrow left", "arrow right", "arrow left 2", "bell"]

    assert count_vocabulary(captions, at_least=1) == ["arrow", "left", "2", "bell", "right"]
    assert count_vocabulary(captions[::-1], at_least=2) == ["arrow", "left"]


def test_a_saved_model_brings_its_vocabulary(vocabularies, tmp_path):
    model, *_ = clipup.create_model_and_transforms("words", load_weights=False)
    clipup.save_pretrained(model, tmp_path / "model", clipup.get_model_config("words"))
    expected = clipup.get_tokenizer("words")(["arrow left h1"])
    (vocabularies / "test.txt").unlink()

    loaded = clipup.get_tokenizer(str(tmp_path / "model"))

    assert torch.equal(loaded(["arrow left h1"]), expected)
    assert loaded.context_length == 6


def test_a_vocabulary_of_another_size_than_the_models_is_refused(vocabularies):
    (vocabularies / "test.txt").write_text("arrow\n")

    with pytest.raises(ValueError, match="makes 5 tokens, but the model has 7"):
        clipup.get_tokenizer("words")


def test_a_missing_vocabulary_is_named(vocabularies):
    (vocabularies / "test.txt").unlink()

    with pytest.raises(FileNotFoundError, match="words:test is neither .*test.txt"):
        clipup.get_tokenizer("words")


@pytest.mark.parametrize("name", ["clipup-icons-w64", "clipup-icons-w128", "clipup-icons-w384-64px"])
def test_every_model_for_icons_ships_with_its_vocabulary(name):
    tokenizer = clipup.get_tokenizer(name)
    text_cfg = clipup.get_model_config(name)["text_cfg"]

    tokens = tokenizer(["arrow left", "no such word as zyzzyva"])

    assert tokens.shape == (2, text_cfg["context_length"]) and tokens.max() == text_cfg["vocab_size"] - 1
    assert tokenizer.decode(tokens[0]) == "arrow left"


@pytest.mark.parametrize(
    "name", ["words:../../secret", "words:/etc/hostname", "words:", "words:a/b", "words:..", "words:a\0"]
)
def test_a_vocabulary_is_a_name_and_no_path(vocabularies, tmp_path, name):
    """A config that came with a model must not read, or copy into the next model, another file of the disk."""
    (tmp_path / "secret.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "shipped" / "a").mkdir()
    config = copy.deepcopy(MODEL_CFG)
    config["text_cfg"]["hf_tokenizer_name"] = name
    model = open_clip.CLIP(**MODEL_CFG)
    with pytest.raises(ValueError, match="hf_tokenizer_name: .* names no vocabulary"):
        clipup.save_pretrained(model, tmp_path / "model", config)
    clipup.save_pretrained(model, tmp_path / "model", MODEL_CFG)
    path = tmp_path / "model" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"words:test"', json.dumps(name)))
    with pytest.raises(ValueError, match="hf_tokenizer_name: .* names no vocabulary"):
        clipup.get_tokenizer(str(tmp_path / "model"))


def test_a_vocabulary_that_is_not_utf8_is_named(vocabularies, tmp_path):
    (tmp_path / "shipped" / "test.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"test\.txt is not UTF-8 text"):
        word_tokenizer.read_vocabulary("words:test")
