"""Fixtures: a small npm package of icon sets, and the icons data set built from it. A ``conftest.py`` imports them."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest

from studies.icon_data import build as icons
from studies.icon_data.build import Sets

SETS = Sets(train=("mdi", "fluent"), test=("carbon",))
NOUNS = "bell box cat door egg fox gate hat ink jar key leaf moon nut owl pen quail rose sun tea urn van".split()
PLACES = "left right up down open shut".split()


def drawing(number: int) -> str:
    """A body of a few rectangles on a 24 x 24 canvas, another one for every number."""
    draw = random.Random(number)
    boxes = [(draw.randrange(18), draw.randrange(18), draw.randrange(3, 12), draw.randrange(3, 12)) for _ in range(3)]
    return "".join(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="currentColor"/>' for x, y, w, h in boxes)


def icon_set(prefix: str, icons_: dict[str, dict]) -> dict:
    licence = {"title": "MIT License", "spdx": "MIT", "url": f"https://example.org/{prefix}/licence"}
    info = {"name": prefix.upper(), "author": {"name": f"{prefix} people"}, "license": licence}
    return {"prefix": prefix, "info": info, "icons": icons_, "width": 24, "height": 24}


@pytest.fixture(scope="module")
def sets_of_package():
    """Three sets: fluent says size and style at the end of every name and turns the words around, the others do not."""
    names = [f"{noun}-{place}" for noun in NOUNS for place in PLACES]
    turned = {f"{place}-{noun}" for noun in NOUNS for place in PLACES}
    fluent = {f"{name}-{size}-filled": {"body": drawing(hash_of(name, size))} for name in turned for size in (16, 24)}
    mdi = {name: {"body": drawing(hash_of(name, 0))} for name in names}
    mdi["circle-outline"] = {"body": '<circle cx="12" cy="12" r="9" fill="none" stroke="currentColor"/>'}
    carbon = {f"{noun}-{place}": {"body": drawing(hash_of(noun + place, 99))} for noun in NOUNS[:6] for place in PLACES}
    return {"mdi": icon_set("mdi", mdi), "fluent": icon_set("fluent", fluent), "carbon": icon_set("carbon", carbon)}


def hash_of(name: str, number: int) -> int:
    return zlib.crc32(f"{name} {number}".encode())


def write_package(root: Path, sets: dict[str, dict]) -> Path:
    """The package as npm's archive unpacks."""
    (root / "json").mkdir(parents=True)
    (root / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": "1.2.3"}))
    for prefix, content in sets.items():
        (root / "json" / f"{prefix}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def make_package(tmp_path_factory, sets_of_package):
    """Writes the package; a function may change the sets first."""

    def make(change=lambda sets: None):
        sets = json.loads(json.dumps(sets_of_package))
        change(sets)
        return write_package(tmp_path_factory.mktemp("npm") / "package", sets)

    return make


@pytest.fixture(scope="module")
def build(tmp_path_factory, make_package):
    def build(change=lambda sets: None, package=None, **options):
        out = tmp_path_factory.mktemp("built") / "icons"
        options = {"sets": SETS, "processes": 1, "progress": False} | options
        return out, icons.build(out, package or make_package(change), **options)

    return build
