"""Building the lexicon data set from a small icons data set."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clipup.data.loaders import eval_samples
from studies import fixed_texts
from studies.icon_data.near_duplicates import SIDE, grey, hashes
from studies.lexicon_data import build as lexicon


@pytest.fixture(scope="module")
def icons(build):
    return build()[0]


def pictures(directory, split):
    return {about["key"]: image for image, _, about in eval_samples(directory / f"{split}-*.tar", pil_to_tensor)}


def test_every_icon_has_a_vector_and_is_tested_in_other_views_than_it_is_trained_in(icons, tmp_path, read):
    dataset = lexicon.build(tmp_path / "out", icons, 40)
    trained, validated, tested = (pictures(tmp_path / "out", split) for split in ("train", "validation", "test_views"))
    vectors, tokenize = fixed_texts.read(tmp_path / "out")

    assert len(trained) == dataset["splits"]["train"]["images"] == 40
    assert trained.keys() == validated.keys() == tested.keys()
    assert all(torch.equal(picture, pictures(icons, "train")[key]) for key, picture in list(trained.items())[:2])
    for key, picture in trained.items():
        assert picture.shape == (3, SIDE, SIDE)
        assert not any(torch.equal(*two) for two in combinations((picture, validated[key], tested[key]), 2))
        assert (picture.float() - validated[key].float()).abs().mean() < 64  # of the same drawing
    assert sorted(tokenize(list(trained)).flatten().tolist()) == list(range(40))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(40))
    assert set(read(tmp_path / "out", "train").popitem()[1]) == {"png", "txt"}


def test_icons_that_look_alike_are_left_out(build, tmp_path):
    def add_copies(sets):
        sets["mdi"]["icons"] |= {f"{name}-again": icon for name, icon in sets["mdi"]["icons"].items()}

    icons, _ = build(add_copies)
    lexicon.build(tmp_path / "out", icons, 40)
    of_gray = np.stack([grey(to_pil_image(picture)) for picture in pictures(tmp_path / "out", "train").values()])
    cosines = np.triu(hashes(of_gray) @ hashes(of_gray).T / 1000**2, 1)
    assert cosines.max() < 0.91


def test_the_same_icons_give_the_same_bytes_and_too_few_are_refused(icons, tmp_path):
    built = [lexicon.build(tmp_path / name, icons, 20) for name in ("one", "two")]
    assert built[0] == built[1] == json.loads((tmp_path / "two" / "dataset.json").read_text())
    vectors, _ = fixed_texts.read(tmp_path / "one")
    assert torch.equal(vectors, fixed_texts.read(tmp_path / "two")[0])
    with pytest.raises(ValueError, match="drawings: .* look different enough, got 100000"):
        lexicon.build(tmp_path / "three", icons, 100_000)
    assert not (tmp_path / "three").exists()
