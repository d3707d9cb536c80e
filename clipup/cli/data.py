"""``clipup data``: builds a data set as WebDataset shards, one subcommand a data set."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..data import icons, pictograms
from . import run_one_of


@dataclass
class Pictograms:
    """Emoji and icons with captions, drawn from Python packages (pip install "clipup[demo]"); no network.

    Twemoji and OpenMoji drawings of the same emoji and Phosphor icons in six stroke weights, RGB on white. Two splits
    are held out: test (one drawing of about 1,000 concepts) and concepts (whole concepts).

    Example: clipup data pictograms data/pictograms --size 32
    """

    out: tyro.conf.Positional[Path]
    """Directory to write; nothing is done when it holds this data set already."""
    size: int = 32
    """Side of the images, in pixels (8 to 512)."""
    overwrite: bool = False
    """Replace another data set in OUT."""
    samples_per_shard: int = 512
    """Samples in a shard; training needs at least as many shards as workers."""
    processes: int | None = None
    """Processes that draw; None: one a CPU."""

    def run(self) -> int:
        start = time.perf_counter()
        dataset = pictograms.build(self.out, self.size, self.overwrite, self.samples_per_shard, self.processes)
        _print_head(self, dataset, time.perf_counter() - start)
        for name, split in dataset["splits"].items():
            shards = len(split["shards"])
            groups = ", ".join(f"{count:,} {group}" for group, count in split["images_by_group"].items())
            print(
                f"  {name:<9}{split['images']:>7,} images ({groups}) of {split['concepts']:,} concepts, "
                f"{split['captions']:,} captions, {shards} shard{'s' * (shards != 1)}"
            )
        if dataset["skipped"]:
            print(f"{len(dataset['skipped'])} drawings could not be read; dataset.json names them", file=sys.stderr)
        print("who made them and under which licences: LICENSES.md there")
        return 0


@dataclass
class Icons:
    """250,000 openly licensed icons with their names as captions, from the npm package @iconify/json; no network.

    RGB on white. Held out are names (validation, test_names) and whole sets in styles of their own (test_styles), and
    with --test-drawings also drawings of names and sets that are trained on (test_drawings).
    Get the package with `npm pack @iconify/json@2.2.535` and `tar -xzf iconify-json-2.2.535.tgz`.

    Example: clipup data icons data/icons --package package
    """

    out: tyro.conf.Positional[Path]
    """Directory to write; nothing is done when it holds this data set already."""
    package: Path
    """Directory of the unpacked npm package @iconify/json."""
    size: int = 32
    """Side of the images, in pixels (8 to 512)."""
    seed: int = 0
    """Another seed holds out other names."""
    leave_out: tuple[str, ...] = ()
    """Sets to do without, by their prefixes."""
    test_drawings: bool = False
    """Hold out drawings whose name and whose set are trained on, too; the other held-out splits stay the same."""
    overwrite: bool = False
    """Replace another data set in OUT."""
    samples_per_shard: int = 4096
    """Samples in a shard; training needs at least as many shards as workers."""
    processes: int | None = None
    """Processes that draw; None: one a CPU."""

    def run(self) -> int:
        start = time.perf_counter()
        dataset = icons.build(
            self.out,
            self.package,
            self.size,
            self.seed,
            self.overwrite,
            self.samples_per_shard,
            self.processes,
            sets=icons.Sets.read().without(self.leave_out),
            test_drawings=self.test_drawings,
        )
        _print_head(self, dataset, time.perf_counter() - start)
        for name, split in dataset["splits"].items():
            twins = dataset["left_out_twins"].get(name)
            left_out = f"; {twins['same']:,} twins and {twins['near']:,} near-twins left out" if twins else ""
            print(
                f"  {name:<13}{split['images']:>8,} images of {len(split['images_by_set'])} sets, "
                f"{split['distinct_captions']:,} captions{left_out}"
            )
        for reason, count in dataset["skipped"].items():
            print(f"{count:,} drawings left out: {reason}", file=sys.stderr)
        print(
            "who drew them and under which licences: LICENSES.md there; which words were cut from names: captions.json"
        )
        return 0


def _print_head(command: Pictograms | Icons, dataset: dict, seconds: float) -> None:
    print(f"{dataset['name']} in {command.out} ({seconds:.0f} s), {command.size} x {command.size} pixels:")


COMMANDS = {"pictograms": Pictograms, "icons": Icons}


def main(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s")
    return run_one_of(COMMANDS, "clipup data", "data set", argv)
