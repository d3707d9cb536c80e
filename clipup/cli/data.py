"""``clipup data``: builds a data set as WebDataset shards, one subcommand per data set."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..data.csv_files import CsvOptions
from ..option_group import all_idle, option
from . import run_subcommand


@dataclass
class Pictograms:
    """Emoji and icons with captions, rendered from Python packages (clipup's extra demo), without a network.

    Twemoji and OpenMoji drawings of the same emoji and Phosphor icons in six stroke weights, RGB on white. Two splits
    are held out: test (one drawing of about 1,000 concepts) and concepts (whole concepts).

    Example: clipup data pictograms data/pictograms --size 32
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write; nothing is done if it contains this data set already."""
    size: int = 32
    """Side of the images, in pixels (8 to 512)."""
    overwrite: bool = False
    """Replace another data set in OUT."""
    samples_per_shard: int = 512
    """Samples per shard."""
    processes: int | None = None
    """Processes that render; None: one per CPU."""

    def run(self) -> int:
        from ..demo.pictograms.build import build

        start = time.perf_counter()
        dataset = build(self.out, self.size, self.overwrite, self.samples_per_shard, self.processes)
        seconds = time.perf_counter() - start
        print(f"{dataset['name']} in {self.out} ({seconds:.0f} s), {self.size} x {self.size} pixels:")
        for name, split in dataset["splits"].items():
            groups = ", ".join(f"{count:,} {group}" for group, count in split["images_by_group"].items())
            print(
                f"  {name:<9}{split['images']:>7,} images ({groups}) of {split['concepts']:,} concepts, "
                f"{split['captions']:,} captions, shards: {len(split['shards'])}"
            )
        print("authors and licences: see LICENSES.md in that directory")
        return 0


@dataclass(kw_only=True)
class Pairs(CsvOptions):
    """Your own image-text pairs, from a CSV file or a folder.

    A CSV file is read as by clipup train, relative paths from the current directory; rows of one image are its
    captions. In a folder (searched with its
    subfolders) the caption of a/b.jpg is in a/b.txt. What cannot be read is named and left out.

    Example: clipup data pairs photos.csv data/photos --csv-separator , --csv-img-key image --csv-caption-key caption
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CSV|FOLDER")]
    """File or folder with the pairs."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write, for --train-data."""
    overwrite: bool = False
    """Replace another data set in OUT."""
    samples_per_shard: int = option(1000, least=1)
    """Samples per shard."""
    processes: int | None = option(None, least=0)
    """Processes that read images; None: one per CPU."""

    def idle(self) -> dict[str, str]:
        return super().idle() | (all_idle(CsvOptions, "on a folder") if Path(self.source).is_dir() else {})

    def run(self) -> int:
        from ..data.image_files import passed_over
        from ..data.own_pairs import build

        dataset = build(self.source, self.out, self, self.samples_per_shard, self.processes, self.overwrite)
        print(f"images with captions: {dataset['images']:,}, skipped: {dataset['skipped']:,}, written to {self.out}")
        if others := passed_over(self.source):
            print(f"not read: {others}")
        return 0


COMMANDS = {"pictograms": Pictograms, "pairs": Pairs}


def main(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s")
    return run_subcommand(COMMANDS, "clipup data", "data set", argv)
