"""Captions as the pieces that tokenizers make of them, and the words that experts take."""

from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clipup.clip.word_tokenizer import WordTokenizer
from clipup.inspection import LayerRouting, WordShare, expert_words, pieces
from clipup.inspection.token_words import Piece, words


def wrapped(tokenizer, start, end):
    """As open_clip wraps tokenizers of Hugging Face."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token=start, eos_token=end
    )
    return SimpleNamespace(tokenizer=fast)


def word_pieces():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "ball", "##oon", "##s", "is"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return wrapped(tokenizer, "[CLS]", "[SEP]")


def sentence_pieces():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁a", "▁ball", "oon", "s", "▁is"]
    tokenizer = Tokenizer(models.Unigram([(name, 0.0) for name in names], unk_id=1))
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer, "[CLS]", "[SEP]")


def byte_pieces():
    """Byte-level BPE without merges: every byte is a token, and the first of a word carries a space."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(letters)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    return wrapped(tokenizer, "[CLS]", "[SEP]")


def test_characters_of_several_tokens_stand_at_the_last_of_them():
    tokenizer = byte_pieces()
    ids = tokenizer.tokenizer("süß 🎈").input_ids
    found = pieces(tokenizer, ids)
    assert len(ids) == 1 + 5 + 1 + 4
    assert [piece.text for piece in found] == ["", "s", "", "ü", "", "ß", "", "", "", "", "🎈"]
    assert set(words(found)) == {"süß", "🎈"}


@pytest.mark.parametrize("kind", [word_pieces, sentence_pieces])
def test_pieces_of_hugging_face_tokenizers(kind):
    found = pieces(kind(), [2, 4, 5, 6, 7, 8, 3, 0, 0])
    assert [piece.text for piece in found] == ["⟨CLS⟩", "a", "ball", "oon", "s", "is", "⟨SEP⟩", "", ""]
    assert words(found) == ["⟨CLS⟩", "a", "balloons", "balloons", "balloons", "is", "⟨SEP⟩", "", ""]


@pytest.mark.parametrize("caption", ["two unbelievably red balloons", "猫 on 🎈 grüße"])
def test_words_of_open_clips_tokenizer_are_those_of_the_caption(caption):
    tokenizer = open_clip.SimpleTokenizer(context_length=40)
    found = pieces(tokenizer, tokenizer(caption)[0])
    whole = list(dict.fromkeys(piece.word for piece in found if piece.word >= 0))
    by_word = dict(zip((piece.word for piece in found), words(found), strict=True))
    assert [by_word[word] for word in whole] == ["⟨start⟩", *caption.split(), "⟨end⟩"]
    assert len(found) == 40 and all(piece == Piece("", -1) for piece in found[-20:])


def test_a_tokenizer_of_whole_words():
    tokenizer = WordTokenizer(["red", "cat"], context_length=6)
    found = pieces(tokenizer, tokenizer("Red zebra cat")[0].tolist())
    assert words(found) == ["⟨start⟩", "red", "⟨unknown⟩", "cat", "⟨end⟩", ""]


def routed(experts, num_experts):
    first = np.array(experts)[..., None]
    return LayerRouting("text", first, np.zeros((*first.shape[:2], num_experts), dtype=np.float32), first[..., 0] >= 0)


def caption(*names):
    return [Piece(name, place) if name else Piece("", -1) for place, name in enumerate(names)]


def test_words_are_ranked_by_what_an_expert_takes_beyond_its_share():
    captions = [caption("cat", "red", "sun"), caption("cat", "red", ""), caption("cat", "sun", "red")]
    layer = routed([[0, 1, 0], [0, 1, 1], [0, 0, 0]], 3)
    # expert 0 was first for 6 of 8 tokens: cat 3 of 3 (0.75 beyond), sun 2 of 2 (0.5), red 1 of 3 (-1.25)
    assert expert_words(layer, captions, 5) == [
        [WordShare("cat", 3, 3), WordShare("sun", 2, 2)],
        [WordShare("red", 2, 3)],
        [],
    ]
    assert expert_words(layer, captions, 1)[0] == [WordShare("cat", 3, 3)]


def test_padding_and_tokens_without_expert_count_for_no_expert():
    captions = [caption("cat", "red", ""), caption("cat", "red", "sun")]
    assert expert_words(routed([[0, -1, 1], [0, -1, 1]], 2), captions, 5) == [
        [WordShare("cat", 2, 2)],
        [WordShare("sun", 1, 1)],
    ]


def test_a_word_that_is_cut_off_ends_before_the_end_of_the_text():
    tokenizer = open_clip.SimpleTokenizer(context_length=4)
    found = words(pieces(tokenizer, tokenizer("unbelievably balloonish")[0]))
    assert found[0] == "⟨start⟩" and found[-1] == "⟨end⟩"
