"""Small data sets of pictures whose colour identifies the sample."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from picture_samples import png
from small_pictograms import all_concepts, all_splits, in_the_small, read, small  # noqa: F401


@pytest.fixture(scope="session")
def picture():
    return png


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

    def tar(self, name: str, members: list[tuple[str, bytes]]) -> Path:
        with tarfile.open(self.folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return self.folder / name

    def csv(self, count: int = 24, separator: str = "\t") -> str:
        """A CSV file with the first caption of each sample."""
        rows = [f"filepath{separator}title"]
        for n in range(count):
            (self.folder / f"{n}.png").write_bytes(png(n))
            rows.append(f"{self.folder / f'{n}.png'}{separator}{self.captions(n)[0]}")
        path = self.folder / "train.csv"
        path.write_text("\n".join(rows) + "\n")
        return str(path)

    def damage_header(self, shard: int, member: str) -> None:
        """Overwrites a member's tar header, so that the member is lost."""
        path = self.folder / f"train-{shard:06d}.tar"
        with tarfile.open(path) as tar:
            offset = tar.getmember(member).offset
        content = bytearray(path.read_bytes())
        content[offset : offset + 512] = b"\xff" * 512
        path.write_bytes(content)

    def damage_content(self, shard: int, member: str) -> None:
        """Overwrites a member's content after the first bytes; its size stays the same."""
        path = self.folder / f"train-{shard:06d}.tar"
        with tarfile.open(path) as tar:
            info = tar.getmember(member)
        content = bytearray(path.read_bytes())
        content[info.offset_data + 12 : info.offset_data + info.size] = b"\x00" * (info.size - 12)
        path.write_bytes(content)


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path)
