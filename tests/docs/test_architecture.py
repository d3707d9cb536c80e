"""docs/architecture.md and CONTRIBUTING.md name rooms and files that exist."""

import re
import runpy

import pytest
from documents import ROOT, blocks, inline_code, name, tables

PAGE = ROOT / "docs" / "architecture.md"
ROOMS = runpy.run_path(str(ROOT / "tests" / "packaging" / "test_rooms.py"))["ROOMS"]
FILE = re.compile(r"[\w./-]+\.(?:py|h|cpp|cu|md|toml|txt|yml|yaml|cff)")


def rows(first_column: str) -> list[list[str]]:
    (rows,) = (rows for rows in tables(PAGE) if rows[0][0] == first_column)
    return rows[1:]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_drawing_has_the_rooms_in_their_order():
    drawing = next(block.text for block in blocks(PAGE, "text") if "(root)" in block.text)
    packages = ("clipup", "clipup_kernels")
    order = [room or "(root)" for package in packages for room in reversed(ROOMS[package])]
    assert re.findall(r"\|  (\w+|\(root\)) {2,}\w", drawing) == order


def test_every_room_has_a_row_and_its_files_exist():
    room, seen = "", set()
    for cell, _, where in rows("room"):
        room = code(cell)[0] if cell else room
        seen.add(room)
        assert (ROOT / room).is_dir(), room
        for path in filter(FILE.fullmatch, code(where)):
            assert (ROOT / path).is_file() or (ROOT / room / path).is_file(), (room, path)
    folders = {package.replace(".", "/"): rooms for package, rooms in ROOMS.items()}
    assert {f"{folder}/{name}" if name else folder for folder, rooms in folders.items() for name in rooms} <= seen


def test_the_additions_touch_files_that_exist():
    additions = rows("to add")
    assert len({what.partition(" of ")[0] for what, *_ in additions}) == 25
    for what, *cells in additions:
        paths = [path for cell in cells for path in code(cell) if "/" in path]
        assert paths and all((ROOT / path).exists() for path in paths), (what, paths)


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=name)
def test_paths_in_the_text_exist(page):
    paths = [path for path in inline_code(page) if "/" in path and FILE.fullmatch(path)]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
