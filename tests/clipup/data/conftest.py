"""Small data sets of pictures whose colour identifies the sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from picture_samples import png, write_tar
from small_pictograms import all_concepts, all_splits, in_the_small, read, small  # noqa: F401


class Pictures:
    """Ways to write the same samples: sample n has red n and the captions "n 0", "n 1", "n 2"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def captions(number: int) -> list[str]:
        return [f"{number} {variant}" for variant in range(3)]

    def shards(self, count: int = 24, shards: int = 4) -> str:
        """Training shards with a sizes.json beside them; returns a pattern that names them."""
        sizes = {}
        for shard in range(shards):
            numbers = range(shard * count // shards, (shard + 1) * count // shards)
            members = [
                member
                for n in numbers
                for member in (
                    (f"s{n}.png", png(n)),
                    (f"s{n}.json", json.dumps({"captions": self.captions(n)}).encode()),
                )
            ]
            self.tar(f"train-{shard:06d}.tar", members)
            sizes[f"train-{shard:06d}.tar"] = len(numbers)
        (self.folder / "sizes.json").write_text(json.dumps(sizes))
        return str(self.folder / f"train-{{000000..{shards - 1:06d}}}.tar")

    def tar(self, name: str, members: list) -> Path:
        return write_tar(self.folder / name, members)

    def csv(self, count: int = 24) -> str:
        """A CSV file with the first caption of each sample."""
        rows = ["filepath\ttitle"]
        for n in range(count):
            (self.folder / f"{n}.png").write_bytes(png(n))
            rows.append(f"{self.folder / f'{n}.png'}\t{self.captions(n)[0]}")
        path = self.folder / "train.csv"
        path.write_text("\n".join(rows) + "\n")
        return str(path)

    def samples(self, name: str, members: dict[str, bytes]) -> Path:
        """A shard of pictures; the caption of sample n is "n 0"."""
        texts = {key: f"{number} 0".encode() for number, key in enumerate(members)}
        pairs = [((f"{key}.png", image), (f"{key}.txt", texts[key])) for key, image in members.items()]
        return self.tar(name, [member for pair in pairs for member in pair])

    def source(self, kind: str, count: int = 24, spoilt: Iterable[int] = ()) -> str:
        """The samples for a kind of training data ("cached csv"); those with these numbers cannot be decoded."""
        source = self.csv(count) if "csv" in kind else self.shards(count)
        for n in spoilt:
            if "csv" in kind:
                (self.folder / f"{n}.png").write_bytes(png(n)[:20])
            else:
                self.damage(n * 4 // count, f"s{n}.png", header=False)
        return f"file:{source}" if kind == "streamed" else source

    def damage(self, shard: int, member: str, header: bool) -> None:
        """Overwrites a member's tar header, so that the member is lost, or its content after the first bytes."""
        path = self.folder / f"train-{shard:06d}.tar"
        with tarfile.open(path) as tar:
            info = tar.getmember(member)
        start, end = (
            (info.offset, info.offset + 512) if header else (info.offset_data + 12, info.offset_data + info.size)
        )
        content = bytearray(path.read_bytes())
        content[start:end] = (b"\xff" if header else b"\x00") * (end - start)
        path.write_bytes(content)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries to read, which take no time."""
    taken = []
    monkeypatch.setattr("clipup.data.skips.sleep", taken.append)
    return taken


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path)
