"""``clipup data``: builds a data set as WebDataset shards, one subcommand per data set."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

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


COMMANDS = {"pictograms": Pictograms}


def main(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s")
    return run_subcommand(COMMANDS, "clipup data", "data set", argv)
