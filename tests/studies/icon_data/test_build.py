"""Building the icons data set from a small package in Iconify's format."""

import io
import json
from collections import Counter

import pytest
from PIL import Image
from small_icons import NOUNS, PLACES, SETS, drawing, hash_of, icon_set

from clipup.demo.pictograms.captions import same_words
from studies.icon_data import build as icons
from studies.icon_data import iconify, splits
from studies.icon_data.build import Sets

HELD_OUT = ("validation", "test_names", "test_styles")
THREE = Sets(train=("mdi", "fluent", "tabler"), test=("carbon",))


@pytest.fixture(scope="module")
def built(build):
    return build()


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_icon_is_a_picture_on_white_with_the_words_of_its_name_and_its_maker(built, read):
    out, dataset = built
    train = read(out, "train")
    pictures = [Image.open(io.BytesIO(sample["png"])) for sample in train.values()]

    assert {(one.mode, one.size, one.getextrema()) for one in pictures} == {("RGB", (32, 32), ((0, 255),) * 3)}
    assert train["mdi/bell-left"]["txt"] == b"bell left" and set(train["mdi/bell-left"]) == {"png", "txt"}
    assert train["mdi/circle-outline"]["txt"] == b"circle outline"
    assert dataset["splits"]["train"]["images"] == len(train)
    assert "| fluent | FLUENT | fluent people | MIT |" in (out / "LICENSES.md").read_text()


def test_words_that_a_set_puts_on_its_names_are_cut_and_recorded(built, read):
    texts = [sample["txt"] for key, sample in read(built[0], "train").items() if key.startswith("fluent/")]
    names = len(NOUNS) * len(PLACES)
    cut = {"names": 2 * names, "end": {"16": names, "24": names, "filled": 2 * names}}
    assert texts and all(text.count(b" ") == 1 for text in texts)
    assert json.loads((built[0] / "captions.json").read_text())["cut"] == {"fluent": cut}


def test_held_out_names_are_trained_on_in_no_set_and_in_no_order_of_words(built, read):
    samples = {split: read(built[0], split) for split in splits.SPLITS}
    said = {split: {same_words(one["txt"].decode()) for one in of.values()} for split, of in samples.items()}
    sets = {split: {key.split("/")[0] for key in of} for split, of in samples.items()}

    assert said["validation"] and said["test_names"] and not said["validation"] & said["test_names"]
    assert not said["train"] & (said["validation"] | said["test_names"])
    assert sets["test_styles"] == {"carbon"} and "carbon" not in sets["train"] | sets["validation"] | sets["test_names"]


def test_the_same_package_and_seed_give_the_same_bytes_and_another_seed_other_splits(build, make_package, monkeypatch):
    package = make_package()
    first, dataset = build(package=package)
    second, _ = build(package=package, processes=2)
    third, other = build(package=package, seed=1)

    assert content(first) == content(second)
    assert content(first)["validation-000000.tar"] != content(third)["validation-000000.tar"]
    assert dataset["fingerprint"] != other["fingerprint"]
    monkeypatch.setattr(iconify, "render", lambda *args: pytest.fail("drawn again"))
    assert icons.build(first, package, sets=SETS) == dataset  # a finished data set is not built again


def add_a_set_with_the_names_of_another(sets):
    """tabler: two drawings of every name of mdi, so that its captions are trained on twice."""
    names = [(name, size) for name in sets["mdi"]["icons"] for size in (7, 8)]
    icons_ = {f"{name}-{size}": {"body": drawing(hash_of(name, size))} for name, size in names}
    sets["tabler"] = icon_set("tabler", icons_)


def test_drawings_are_held_out_of_training_where_another_set_keeps_the_name(build, read):
    plain, before = build(add_a_set_with_the_names_of_another, sets=THREE)
    out, after = build(add_a_set_with_the_names_of_another, sets=THREE, test_drawings=True)
    trained_before, trained, held_out = read(plain, "train"), read(out, "train"), read(out, "test_drawings")

    assert held_out.keys() <= trained_before.keys() and trained.keys() == trained_before.keys() - held_out.keys()
    assert 0.02 < len(held_out) / len(trained_before) < 2 * splits.TEST_DRAWINGS_SHARE
    for key, sample in held_out.items():
        of, caption = key.split("/")[0], sample["txt"]
        sets = {other.split("/")[0] for other, one in trained.items() if one["txt"] == caption}
        assert sets and of not in sets, key  # all drawings that this set has of the name are held out together
        assert json.loads(sample["json"]) == {"captions": [caption.decode()], "group": of}
    for split in HELD_OUT:  # the same with and without drawings
        assert before["splits"][split] == after["splits"][split] and before["splits"][split]["images"]  # with sha256
    assert before["fingerprint"] != after["fingerprint"]


def test_held_out_drawings_with_a_twin_in_training_are_left_out_and_counted(built, build, read):
    def copy_drawings(sets):
        circle, carbon = sets["mdi"]["icons"]["circle-outline"]["body"], sets["carbon"]["icons"]
        for place, radius in (("left", "9"), ("right", "9.2"), ("up", "4")):  # the same, nearly the same, another one
            carbon[f"bell-{place}"] = {"body": circle.replace('r="9"', f'r="{radius}"')}

    out, dataset = build(copy_drawings)

    gone = set(read(built[0], "test_styles")) - set(read(out, "test_styles"))
    assert gone == {"carbon/bell-left", "carbon/bell-right"} and "mdi/circle-outline" in read(out, "train")
    assert dataset["left_out_twins"]["test_styles"] == {"same": 1, "near": 1}


def test_unreadable_and_blank_icons_are_counted_and_sets_can_be_left_out(build, read):
    def spoil(sets):
        icons_ = sets["mdi"]["icons"]
        icons_["bell-left"]["body"] = "<path"
        icons_["bell-up"]["body"] = '<path d="M0 0h24v24z" fill="none"/>'
        icons_["bell-down"]["hidden"] = True

    out, dataset = build(spoil, sets=SETS.without(["fluent"]))

    assert dataset["skipped"] == {"cannot be read": 1, "shows nothing": 1}
    keys = {key for split in splits.SPLITS for key in read(out, split)}
    assert not {"mdi/bell-left", "mdi/bell-up", "mdi/bell-down"} & keys
    assert {one["set"] for one in dataset["sources"]} == {"mdi", "carbon"}
    with pytest.raises(ValueError, match="leave_out: nowhere"):
        SETS.without(["mdi", "nowhere"])


def test_the_vocabulary_is_made_of_training_captions(built, read):
    out, _ = built
    said = Counter(word for sample in read(out, "train").values() for word in sample["txt"].decode().split())
    frequent = {word for word, count in said.items() if count >= icons.WORDS_AT_LEAST}
    words = (out / "vocabulary.txt").read_text().split()
    assert set(words) == frequent and words == sorted(words, key=lambda word: -said[word])


def test_a_directory_without_the_package_is_refused(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"package: .*npm pack"):
        build(package=tmp_path)
    sets = Sets.read()  # the study's own
    assert (len(sets.train), len(sets.test), len({*sets.train, *sets.test})) == (135, 10, 145)
