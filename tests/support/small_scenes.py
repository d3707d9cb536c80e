"""A small npm package of icon sets with enough of them for scenes, and the scenes built from it."""

from __future__ import annotations

import pytest
from small_icons import drawing, hash_of, icon_set, write_package

from studies.icon_data.build import Sets
from studies.scene_data.build import build

THINGS = "bell box cat door egg fox gate hat ink jar key leaf".split()
TRAIN = [f"set{number}" for number in range(14)]
SETS = Sets(train=(*TRAIN, "flags"), test=("styled",))
SMALL = {"number": 10, "sets": SETS, "groups": {"validation": 3, "test": 5}, "processes": 1, "progress": False}


@pytest.fixture(scope="module")
def scenes_package(tmp_path_factory):
    """Fifteen sets of the same things in one colour, each drawn otherwise, and one in colours of its own."""

    def write(change=lambda sets: None):
        sets = {}
        for prefix in (*TRAIN, "flags", "styled"):
            names = [*THINGS, "red-cross", "arrow-left", "very-long-name"]
            sets[prefix] = icon_set(prefix, {name: {"body": drawing(hash_of(name + prefix, 0))} for name in names})
            sets[prefix]["info"]["palette"] = prefix == "flags"
        change(sets)
        return write_package(tmp_path_factory.mktemp("npm") / "package", sets)

    return write


@pytest.fixture(scope="module")
def scenes_data(scenes_package, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "scenes"
    build(out, scenes_package(), **SMALL)
    return out
