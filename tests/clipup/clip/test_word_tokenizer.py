"""The word tokenizer, alone and as the tokenizer of a saved model."""

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
    """A replacement of the package's vocabulary directory, with the vocabulary of MODEL_CFG."""
    monkeypatch.setattr(word_tokenizer, "_VOCABULARIES", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "test.txt").write_text("\n".join(WORDS) + "\n")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "words", copy.deepcopy(MODEL_CFG))
    return tmp_path / "shipped"


def test_tokens_are_start_words_end_and_padding(tokenizer):
    tokens = tokenizer(["arrow left", "Arrow, H1", "arrow nowhere left", ""])

    assert tokens.tolist() == [
        [1, 3, 4, 6, 0, 0],
        [1, 3, 5, 6, 0, 0],
        [1, 3, 2, 4, 6, 0],
        [1, 6, 0, 0, 0, 0],
    ]
    assert tokens.dtype == torch.int64 and tokenizer.vocab_size == 7
    assert tokenizer("arrow left").tolist() == tokens[:1].tolist()
    assert tokenizer.decode(tokenizer("left Arrow nowhere h1")[0]) == "left arrow ? h1"


def test_long_text_is_truncated_before_its_end_token(tokenizer):
    tokens = tokenizer(["left " * 20, "left " * 4])

    assert tokens.tolist() == [[1, 4, 4, 4, 4, 6]] * 2
    assert tokenizer(["left"], context_length=3).tolist() == [[1, 4, 6]]


@pytest.mark.parametrize(
    "words, context_length, message",
    [
        (["arrow", "arrow"], 6, "'arrow' is duplicated"),
        (["arrow left"], 6, "'arrow left' is not a single word"),
        (["Arrow"], 6, "not a single word of lower-case"),
        (["arrow"], 2, "context_length: got 2"),
    ],
)
def test_invalid_vocabulary_is_refused(words, context_length, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(words, context_length)


def test_vocabulary_is_ordered_by_frequency():
    captions = ["arrow left", "arrow right", "arrow left 2", "bell"]

    assert count_vocabulary(captions, at_least=1) == ["arrow", "left", "2", "bell", "right"]
    assert count_vocabulary(captions[::-1], at_least=2) == ["arrow", "left"]


def test_saved_model_includes_its_vocabulary_and_one_of_another_size_is_refused(vocabularies, tmp_path):
    clipup.save_pretrained(open_clip.CLIP(**MODEL_CFG), tmp_path / "model", MODEL_CFG)
    expected = clipup.get_tokenizer("words")(["arrow left h1"])
    (vocabularies / "test.txt").write_text("arrow\n")

    assert torch.equal(clipup.get_tokenizer(str(tmp_path / "model"))(["arrow left h1"]), expected)
    with pytest.raises(ValueError, match="has 5 tokens, but the model has vocab_size=7"):
        clipup.get_tokenizer("words")


@pytest.mark.parametrize("name", ["clipup-icons-w64", "clipup-icons-w16"])
def test_every_icon_model_ships_with_its_vocabulary(name):
    tokenizer = clipup.get_tokenizer(name)
    text_cfg = clipup.get_model_config(name)["text_cfg"]

    tokens = tokenizer(["arrow left", "no such word as zyzzyva"])

    assert tokens.shape == (2, text_cfg["context_length"]) and tokens.max() == text_cfg["vocab_size"] - 1
    assert tokenizer.decode(tokens[0]) == "arrow left"


@pytest.mark.parametrize(
    "name", ["words:../../secret", "words:/etc/hostname", "words:", "words:a/b", "words:..", "words:a\0"]
)
def test_vocabulary_name_must_not_be_a_path(vocabularies, tmp_path, name):
    """The config of a downloaded model must not read other files, or copy them into a saved model."""
    (tmp_path / "secret.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "shipped" / "a").mkdir()
    config = {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], "hf_tokenizer_name": name}}
    clipup.save_pretrained(open_clip.CLIP(**MODEL_CFG), tmp_path / "model", MODEL_CFG)
    path = tmp_path / "model" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"words:test"', json.dumps(name)))
    for call in (
        lambda: clipup.save_pretrained(open_clip.CLIP(**MODEL_CFG), tmp_path / "other", config),
        lambda: clipup.get_tokenizer(str(tmp_path / "model")),
    ):
        with pytest.raises(ValueError, match="hf_tokenizer_name: .* is not a vocabulary name"):
            call()
