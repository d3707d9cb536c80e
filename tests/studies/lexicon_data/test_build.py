"""Building the lexicon data set from a small icons data set."""

import json

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from clipup.data.loaders import eval_samples
from studies import fixed_texts
from studies.icon_data.near_duplicates import SIDE
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
        assert not torch.equal(picture, validated[key]) and not torch.equal(validated[key], tested[key])
        assert (picture.float() - validated[key].float()).abs().mean() < 64  # of the same drawing
    assert sorted(tokenize(list(trained)).flatten().tolist()) == list(range(40))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(40))
    assert set(read(tmp_path / "out", "train").popitem()[1]) == {"png", "txt"}


def test_the_same_icons_give_the_same_bytes_and_too_few_are_refused(icons, tmp_path):
    built = [lexicon.build(tmp_path / name, icons, 20) for name in ("one", "two")]
    assert built[0] == built[1] == json.loads((tmp_path / "two" / "dataset.json").read_text())
    vectors, _ = fixed_texts.read(tmp_path / "one")
    assert torch.equal(vectors, fixed_texts.read(tmp_path / "two")[0])
    with pytest.raises(ValueError, match="drawings: .* look different enough, got 100000"):
        lexicon.build(tmp_path / "three", icons, 100_000)
    assert not (tmp_path / "three").exists()
