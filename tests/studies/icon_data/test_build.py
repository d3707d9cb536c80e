"""Building the icons data set from a small package in Iconify's format."""

from __future__ import annotations

import io
import json

import numpy
import pytest
import torch
from PIL import Image
from small_icons import NOUNS, PLACES, SETS, drawing, hash_of, icon_set

from clipup.data.loaders import eval_samples, train_loader
from clipup.demo.pictograms.captions import same_words
from studies.icon_data import build as icons
from studies.icon_data import iconify, splits
from studies.icon_data.build import Sets

HELD_OUT = ("validation", "test_names", "test_styles")
THREE = Sets(train=("mdi", "fluent", "tabler"), test=("carbon",))


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_sets_can_be_left_out_by_name(build):
    _, dataset = build(sets=SETS.without(["fluent"]))

    assert {one["set"] for one in dataset["sources"]} == {"mdi", "carbon"}
    assert SETS.without(["carbon"]) == Sets(train=("mdi", "fluent"), test=())
    with pytest.raises(ValueError, match="leave_out: nowhere: not a set of this data set"):
        SETS.without(["mdi", "nowhere"])


def test_every_icon_is_a_picture_on_white_with_the_words_of_its_name(build, read):
    out, dataset = build()

    train = read(out, "train")
    pictures = [Image.open(io.BytesIO(sample["png"])) for sample in train.values()]

    assert {(one.mode, one.size) for one in pictures} == {("RGB", (32, 32))}
    assert {one.getextrema() for one in pictures} == {((0, 255),) * 3}  # black on white
    assert train["mdi/bell-left"]["txt"] == b"bell left"
    assert train["mdi/circle-outline"]["txt"] == b"circle outline"
    assert set(train["mdi/bell-left"]) == {"png", "txt"}
    assert dataset["splits"]["train"]["images"] == len(train)


def test_words_that_a_set_puts_on_its_names_are_cut_and_recorded(build, read):
    out, _ = build()

    fluent = {key: sample for key, sample in read(out, "train").items() if key.startswith("fluent/")}
    recorded = json.loads((out / "captions.json").read_text())

    assert fluent and all(sample["txt"].decode().count(" ") == 1 for sample in fluent.values())
    names = len(NOUNS) * len(PLACES)
    assert recorded["cut"] == {"fluent": {"names": 2 * names, "end": {"16": names, "24": names, "filled": 2 * names}}}
    assert "2%" in recorded["rule"] and recorded["why"] and "filled" in recorded["style_words"]


def test_held_out_names_are_trained_on_in_no_set_and_in_no_order_of_words(build, read):
    out, dataset = build(size=16)
    captions = {
        split: {sample["txt"].decode() for sample in read(out, split).values()} for split in icons.splits.SPLITS
    }
    said = {split: set(map(same_words, texts)) for split, texts in captions.items()}

    assert said["validation"] and said["test_names"]
    assert not said["train"] & (said["validation"] | said["test_names"])
    assert not said["validation"] & said["test_names"]
    assert {key.split("/")[0] for key in read(out, "test_styles")} == {"carbon"}
    assert all(key.split("/")[0] in SETS.train for split in HELD_OUT[:2] for key in read(out, split))


def test_the_same_package_and_seed_give_the_same_bytes_and_another_seed_other_splits(build, make_package):
    package = make_package()

    first, dataset = build("first", package=package)
    second, _ = build("second", package=package, processes=2)
    third, other = build("third", package=package, seed=1)

    assert content(first) == content(second)
    assert content(first)["validation-000000.tar"] != content(third)["validation-000000.tar"]
    assert dataset["fingerprint"] != other["fingerprint"]


def test_a_finished_data_set_is_not_built_again(build, make_package, monkeypatch):
    package = make_package()
    _, dataset = build(package=package)
    monkeypatch.setattr(iconify, "render", lambda *args: pytest.fail("drawn again"))

    assert build(package=package)[1] == dataset


def test_held_out_drawings_that_are_trained_on_are_left_out_and_counted(build, read):
    def copy_drawings(sets):
        mdi, carbon = sets["mdi"]["icons"], sets["carbon"]["icons"]
        carbon["bell-left"] = mdi["circle-outline"]  # the same drawing under another name
        body = mdi["circle-outline"]["body"].replace('r="9"', 'r="9.2"')
        carbon["bell-right"] = {"body": body}  # nearly the same
        carbon["bell-up"] = {"body": body.replace('r="9.2"', 'r="4"')}  # another one

    before = read(build("before")[0], "test_styles")
    out, dataset = build("after", copy_drawings)
    after = read(out, "test_styles")

    assert {"carbon/bell-left", "carbon/bell-right", "carbon/bell-up"} <= set(before)
    assert set(before) - set(after) == {"carbon/bell-left", "carbon/bell-right"}
    assert dataset["left_out_twins"]["test_styles"] == {"same": 1, "near": 1}
    assert "mdi/circle-outline" in read(out, "train")


def add_a_set_with_the_names_of_another(sets):
    """tabler: two drawings of every name of mdi, so that its captions are trained on twice."""
    names = [(name, size) for name in sets["mdi"]["icons"] for size in (7, 8)]
    icons_ = {f"{name}-{size}": {"body": drawing(hash_of(name, size))} for name, size in names}
    sets["tabler"] = icon_set("tabler", icons_)


def test_drawings_are_held_out_of_training_where_another_set_keeps_the_name(build, read):
    options = {"change": add_a_set_with_the_names_of_another, "sets": THREE}
    trained_before = read(build("plain", **options)[0], "train")
    out, dataset = build("drawings", test_drawings=True, **options)
    trained, held_out = read(out, "train"), read(out, "test_drawings")

    assert held_out.keys() <= trained_before.keys() and trained.keys() == trained_before.keys() - held_out.keys()
    assert 0.02 < len(held_out) / len(trained_before) < 2 * splits.TEST_DRAWINGS_SHARE
    for key, sample in held_out.items():
        of, caption = key.split("/")[0], sample["txt"]
        sets = {other.split("/")[0] for other, one in trained.items() if one["txt"] == caption}
        assert sets and of not in sets, key  # all drawings that this set has of the name are held out together
        assert json.loads(sample["json"]) == {"captions": [caption.decode()], "group": of}
    assert {key.split("/")[0] for key in held_out} == {"mdi", "tabler"}  # fluent's captions are its own
    assert dataset["splits"]["test_drawings"]["images"] == len(held_out) and "test_drawings" in dataset["rules"]


def test_the_other_held_out_splits_are_the_same_with_and_without_drawings(build):
    def copy_drawings(sets):  # of all that is trained on, some of it held out as a drawing, into the test set of styles
        add_a_set_with_the_names_of_another(sets)
        sets["carbon"]["icons"] |= {f"copy-{name}": one for name, one in sets["tabler"]["icons"].items()}

    plain, before = build("plain", copy_drawings, sets=THREE)
    out, after = build("drawings", copy_drawings, sets=THREE, test_drawings=True)

    assert before["fingerprint"] != after["fingerprint"]
    for split in HELD_OUT:
        assert before["splits"][split] == after["splits"][split] and before["splits"][split]["images"]  # with sha256
        assert before["left_out_twins"][split] == after["left_out_twins"][split]
    assert before["left_out_twins"]["test_styles"]["same"] and "test_drawings" not in before["left_out_twins"]
    assert not list(plain.glob("test_drawings*")) and list(out.glob("test_drawings-*.tar"))


def test_held_out_drawings_with_a_near_duplicate_in_training_are_in_neither(build, read):
    before, _ = build("before", add_a_set_with_the_names_of_another, sets=THREE, test_drawings=True)
    first, second, *_ = sorted(key for key in read(before, "test_drawings") if key.startswith("mdi/"))

    def copy_drawings(sets):
        add_a_set_with_the_names_of_another(sets)
        icons_ = sets["mdi"]["icons"]
        icons_["circle-copy"] = icons_[first.removeprefix("mdi/")]
        body = icons_[second.removeprefix("mdi/")]["body"]
        icons_["square-copy"] = {"body": f'<g transform="translate(.1 0)">{body}</g>'}

    out, dataset = build("after", copy_drawings, sets=THREE, test_drawings=True)

    assert not {first, second} & (read(out, "test_drawings").keys() | read(out, "train").keys())
    assert {"mdi/circle-copy", "mdi/square-copy"} <= read(out, "train").keys()
    assert dataset["left_out_twins"]["test_drawings"] == {"same": 1, "near": 1}


def test_what_cannot_be_drawn_and_what_shows_nothing_is_left_out_and_counted(build, read):
    def spoil(sets):
        icons_ = sets["mdi"]["icons"]
        icons_["bell-left"]["body"] = "<path"
        icons_["bell-up"]["body"] = '<path d="M0 0h24v24z" fill="none"/>'
        icons_["bell-down"]["hidden"] = True

    out, dataset = build(change=spoil)

    assert dataset["skipped"] == {"cannot be read": 1, "shows nothing": 1}
    keys = {key for split in splits.SPLITS for key in read(out, split)}
    assert not {"mdi/bell-left", "mdi/bell-up", "mdi/bell-down"} & keys


def test_makers_and_licences_are_named(build):
    out, dataset = build()

    assert [credit["licence"] for credit in dataset["sources"]] == ["MIT"] * 3
    assert sum(credit["images"] for credit in dataset["sources"]) == sum(
        split["images"] for split in dataset["splits"].values()
    )
    assert "fluent people" in (out / "LICENSES.md").read_text()


def test_the_vocabulary_is_made_of_training_captions(build, read):
    out, dataset = build()

    words = (out / "vocabulary.txt").read_text().split()
    counts = {word: 0 for word in words}
    for sample in read(out, "train").values():
        for word in sample["txt"].decode().split():
            counts[word] = counts.get(word, 0) + 1

    assert set(words) == {word for word, count in counts.items() if count >= icons.WORDS_AT_LEAST}
    assert [counts[word] for word in words] == sorted((counts[word] for word in words), reverse=True)
    assert dataset["vocabulary"]["words"] == len(words)


def test_training_and_evaluation_read_it(build, read):
    out, dataset = build()

    def preprocess(image):
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()

    def tokenizer(texts):
        return torch.tensor([[len(text)] for text in texts])

    batches = list(train_loader(out, preprocess, tokenizer, 32, workers=0, cache=True, progress=False).dataloader)
    samples = list(eval_samples(out / "test_styles-*.tar", preprocess))

    assert len(batches) == dataset["splits"]["train"]["images"] // 32
    assert len(samples) == dataset["splits"]["test_styles"]["images"]
    assert {metadata["group"] for _, _, metadata in samples} == {"carbon"}
    assert all(len(captions) == 1 for _, captions, _ in samples)


def test_the_sets_of_the_study_are_each_in_one_list():
    sets = Sets.read()

    assert len(sets.train) == 135 and len(sets.test) == 10
    assert len({*sets.train, *sets.test}) == 145
