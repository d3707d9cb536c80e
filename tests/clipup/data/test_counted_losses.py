"""Every lost sample of a shard is counted, whatever its name or kind, so that ``max_skipped`` limits what is lost."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile

import pytest
from picture_samples import preprocess, samples_of, tokenizer

from clipup.data.loaders import eval_samples, train_loader
from clipup.data.shard_names import not_a_source

KINDS = ("indexed", "cached", "streamed")


def read(path, kind, count=24, **options):
    """The pictures of an epoch, and the number of skipped samples."""
    source, size = (f"file:{path}", {"train_num_samples": count}) if kind == "streamed" else (path, {})
    options = {"max_skipped": 1.0, "progress": False, **size, **options}
    data = train_loader(source, preprocess, tokenizer, 1, 0, cache=kind == "cached", **options)
    return {picture for picture, _, _ in samples_of(data.dataloader)}, data.skipped


def sample(key, content, number):
    return [(f"{key}.png", content), (f"{key}.txt", f"{number} 0".encode())]


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_whose_key_has_a_dot_is_counted_and_the_reason_is_said(pictures, picture, kind, caplog):
    members = [one for n in range(24) for one in sample(f"s{n}" if n < 12 else f"photo.{n}", picture(n), n)]
    path = pictures.tar("train.tar", members)
    assert read(path, kind) == (set(range(12)), 12)
    assert "skipped images of photo in" in caplog.text and "photo.12.png and the like are no samples" in caplog.text
    assert "rename them, such as photo_12.png" in caplog.text
    with pytest.raises(ValueError, match="max_skipped: 12 of 24 samples"):
        read(path, kind, max_skipped=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_images_whose_keys_have_dots_are_not_counted_twice_beside_a_list_of_sizes(pictures, picture, kind):
    members = [one for n in range(24) for one in sample(f"s{n}" if n < 12 else f"photo.{n}", picture(n), n)]
    path = pictures.tar("train.tar", members)
    (pictures.folder / "sizes.json").write_text('{"train.tar": 24}')
    assert read(path, kind) == (set(range(12)), 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_further_image_of_a_sample_is_no_lost_sample(pictures, picture, kind):
    members = [one for n in range(4) for one in (*sample(f"s{n}", picture(n), n), (f"s{n}.mask.png", picture(99)))]
    assert read(pictures.tar("train.tar", members), kind, 4) == (set(range(4)), 0)


@pytest.mark.parametrize("kind", [*KINDS, "evaluation"])
def test_unreadable_samples_with_the_same_key_are_counted_each(pictures, picture, kind):
    members = [one for n in range(24) for one in sample("image", picture(n) if n % 4 == 0 else b"broken", n)]
    path = pictures.tar("train.tar", members)
    if kind == "evaluation":
        samples = eval_samples(path, preprocess, max_skipped=1.0)
        assert (len(list(samples)), samples.skipped) == (6, 18)
    else:
        assert read(path, kind) == (set(range(0, 24, 4)), 18)
    with pytest.raises(ValueError, match="max_skipped|fewer than|too few"):
        list(eval_samples(path, preprocess)) if kind == "evaluation" else read(path, kind, max_skipped=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_incomplete_samples_with_the_same_key_are_counted_each(pictures, picture, kind):
    members = [("image.png", picture(n)) for n in range(3)] + sample("s3", picture(3), 3)
    assert read(pictures.tar("train.tar", members), kind, 4) == ({3}, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_samples_that_are_links_are_counted_and_the_reason_is_said(pictures, picture, kind, link, caplog):
    path = pictures.tar("train.tar", [one for n in range(4) for one in sample(f"s{n}", picture(n), n)])
    with tarfile.open(path, "a") as tar:
        for n, extensions in ((4, ("png", "txt")), (5, ("png", "txt")), (6, ("png",))):
            for extension in extensions:
                member = tarfile.TarInfo(f"s{n}.{extension}")
                member.type, member.linkname = link, f"s0.{extension}"
                tar.addfile(member)
        member = tarfile.TarInfo("s6.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"6 0"))
    assert read(path, kind, 7) == (set(range(4)), 3)
    assert caplog.text.count("it has no image beside it (links are not read") == 3


def test_the_advised_command_makes_samples_of_links(pictures, picture, monkeypatch):
    folder = pictures.folder / "my photos"
    folder.mkdir()
    for n in range(2):
        (folder / f"s{n}.png").write_bytes(picture(n))
        (folder / f"s{n}.txt").write_text(f"{n} 0")
    for number, link in ((2, os.link), (3, os.symlink)):
        for extension in ("png", "txt"):
            link(folder / f"s0.{extension}", folder / f"s{number}.{extension}")
    monkeypatch.chdir(pictures.folder)
    command = str(not_a_source("train_data", "my photos")).partition("make a shard: ")[2].partition(" and name")[0]
    subprocess.run(command, shell=True, check=True)
    data = train_loader("data.tar", preprocess, tokenizer, 1, 0, progress=False)
    assert sorted(picture for picture, _, _ in samples_of(data.dataloader)) == [0, 0, 0, 1] and data.skipped == 0
