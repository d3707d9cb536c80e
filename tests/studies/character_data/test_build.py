"""Building the characters data set from small packages, whose typeface is Pillow's and whose characters are letters."""

import bz2
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import ImageFont
from torchvision.transforms.functional import pil_to_tensor

from clipup.data.loaders import eval_samples
from studies import fixed_texts
from studies.character_data import build
from studies.character_data.definitions import read_definitions

MEANINGS = {"a": "one; (of birds) to sing", "b": "variant of U+0061 a; two", "c": "old form", "d": "one", "e": "to eat"}
NOT_DRAWN = {"\u4e2d": "middle"}
"""By Pillow's typeface."""


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Directories of the packages, two of them with the same typeface."""
    readings = tmp_path / "unpacked" / "unicode-data" / "usr/share/unicode"
    readings.mkdir(parents=True)
    lines = (f"U+{ord(character):04X}\tkDefinition\t{meaning}" for character, meaning in (MEANINGS | NOT_DRAWN).items())
    (readings / "Unihan_Readings.txt.bz2").write_bytes(bz2.compress("\n".join(["# Unihan", *lines]).encode()))
    for package in ("unicode-data", "fonts-one", "fonts-two", "fonts-three"):
        said = tmp_path / "unpacked" / package / "usr/share/doc" / package
        said.mkdir(parents=True)
        (said / "copyright").write_text(f"{package}: free")
    for name in ("one", "two", "three"):
        (tmp_path / "unpacked" / f"fonts-{name}" / f"{name}.ttf").write_bytes(ImageFont.load_default(28).font_bytes)
    splits = {
        "train": ["fonts-one/one.ttf"],
        "validation": ["fonts-two/two.ttf"],
        "test_typefaces": ["fonts-three/three.ttf"],
    }
    (tmp_path / "typefaces.json").write_text(json.dumps(splits))
    monkeypatch.setattr(build, "_TYPEFACES", tmp_path / "typefaces.json")
    return tmp_path / "unpacked"


@pytest.fixture
def built(unpacked, tmp_path, monkeypatch):
    def encode(texts):
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    encode.bert = SimpleNamespace(config=SimpleNamespace(hidden_size=2))
    monkeypatch.setattr(build, "read_sentence_encoder", lambda path: (encode, lambda texts: {"texts": texts}))
    out, wheel = tmp_path / "out", tmp_path / "wheel"
    return lambda meanings=3, **options: (out, build.build(out, unpacked, wheel, meanings, **options))


def test_a_definition_is_what_a_character_means_and_not_how_it_is_written(unpacked):
    assert read_definitions(unpacked / "unicode-data") == NOT_DRAWN | {
        "a": "one; to sing",
        "b": "two",
        "d": "one",
        "e": "to eat",
    }


def test_characters_are_captioned_with_their_meaning_in_typefaces_of_one_split_each(built):
    out, dataset = built()

    assert {name: split["typefaces"] for name, split in dataset["splits"].items()} == {
        "train": ["one.ttf"],
        "validation": ["two.ttf"],
        "test_typefaces": ["three.ttf"],
    }
    samples = list(eval_samples(str(out / "validation-*.tar"), pil_to_tensor))
    assert {about["key"]: texts for _, texts, about in samples} == {  # of four definitions as often drawn, three
        "U+0061/two": ["one; to sing"],
        "U+0064/two": ["one"],
        "U+0065/two": ["to eat"],
    }
    assert all(image.shape[1:] == (32, 32) and image.min() < 100 and image.max() == 255 for image, _, _ in samples)
    assert (out / "licences" / "fonts-one").read_text() == "fonts-one: free"
    assert built()[1] == json.loads((out / "dataset.json").read_text())  # not built again


def test_captions_are_rows_of_fixed_vectors_without_their_mean(built):
    vectors, tokenize = fixed_texts.read(built()[0])
    texts = ["to eat", "one"]
    torch.testing.assert_close(vectors.mean(0), torch.zeros(2))
    found = fixed_texts.FixedTexts(vectors)(tokenize(texts))
    assert (found[0] - found[1]).tolist() == [3.0, 0.0]  # their embeddings are their lengths here
    assert tokenize("one").shape == (1, 1)


def test_a_missing_package_is_named_with_its_command(unpacked, tmp_path):
    (unpacked / "fonts-two" / "two.ttf").unlink()
    with pytest.raises(FileNotFoundError, match="apt-get download fonts-two"):
        build.build(tmp_path / "out", unpacked, tmp_path / "wheel", 3)


def test_other_typefaces_make_another_data_set_that_names_them(built, tmp_path):
    _, usual = built()
    others = {"train": ["fonts-two/two.ttf", "fonts-one/one.ttf"], "test": ["fonts-three/three.ttf"]}
    (tmp_path / "others.json").write_text(json.dumps(others))

    _, dataset = built(typefaces=tmp_path / "others.json", overwrite=True)

    assert dataset["fingerprint"] != usual["fingerprint"] and "typefaces" not in usual["options"]
    assert dataset["options"]["typefaces"] == others and dataset["splits"]["train"]["images"] == 6
