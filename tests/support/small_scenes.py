"""A small npm package of icon sets with enough of them for scenes, and the scenes built from it."""

from __future__ import annotations

import json

import pytest
from small_icons import drawing, hash_of, icon_set

from studies.icon_data.build import Sets
from studies.scene_data.build import build

THINGS = "bell box cat door egg fox gate hat ink jar key leaf".split()
TRAIN = [f"set{number}" for number in range(14)]
SETS = Sets(train=(*TRAIN, "flags"), test=("styled",))
SMALL = {"number": 10, "sets": SETS, "groups": {"validation": 3, "test": 5}, "processes": 1, "progress": False}


@pytest.fixture
def scenes_package(tmp_path):
    """Fifteen sets of the same things in one colour, each drawn otherwise, and one in colours of its own."""

    def write(change=lambda sets: None, name="npm"):
        sets = {}
        for prefix in (*TRAIN, "flags", "styled"):
            names = [*THINGS, "red-cross", "arrow-left", "very-long-name"]
            icons = {name: {"body": drawing(hash_of(name + prefix, 0))} for name in names}
            sets[prefix] = icon_set(prefix, icons)
            sets[prefix]["info"]["palette"] = prefix == "flags"
        change(sets)
        (tmp_path / name / "json").mkdir(parents=True)
        (tmp_path / name / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": "1.2.3"}))
        for prefix, content in sets.items():
            (tmp_path / name / "json" / f"{prefix}.json").write_text(json.dumps(content))
        return tmp_path / name

    return write


@pytest.fixture
def scenes_data(scenes_package, tmp_path):
    build(tmp_path / "scenes", scenes_package(), **SMALL)
    return tmp_path / "scenes"
