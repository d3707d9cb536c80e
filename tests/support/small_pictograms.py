"""Fixtures: pictograms of a few concepts, built once a session. A ``conftest.py`` imports those that it wants."""

from __future__ import annotations

import hashlib
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest

from clipup.demo.pictograms import build, sources, splits


@pytest.fixture(scope="session")
def all_concepts():
    return sources.concepts()


@pytest.fixture(scope="session")
def all_splits(all_concepts):
    return splits.assign(all_concepts)


def few(concept) -> bool:
    """About one family of emoji in twenty, with all its skin tones, and one icon in twenty."""
    name = splits.base(concept.sequence) if concept.sequence else concept.key
    return hashlib.sha256(name.encode()).digest()[0] < 12


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A built data set of a few hundred pictures, and what `build` said about it."""
    out = tmp_path_factory.mktemp("data") / "pictograms"
    return out, build.build(out, samples_per_shard=64, processes=2, progress=False, only=few)


def read_split(directory: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Members by key and extension."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in sorted(directory.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples[key][extension] = tar.extractfile(member).read()
    return samples


@pytest.fixture(scope="session")
def in_the_small():
    return few


@pytest.fixture(scope="session")
def read():
    return read_split
