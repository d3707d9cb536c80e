"""The rooms of the packages: which may import which, no import circles, and imports inside functions with a reason."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "clipup": (
        *("", "data", "dense", "moe", "clip", "upcycling", "inference", "models", "evaluate", "train", "plan"),
        *("inspection", "search", "demo", "cli"),
    ),
    "clipup.train": ("parallel", "optimizer", "objectives", "checkpoints", "log", ""),
    "clipup_kernels": ("", "triton", "backends", "ops"),
}
"""The rooms of a package, each importing only those before it. "" is the package's own modules."""
FACADES = {"clipup.__init__", "clipup.__main__"}
FACADES |= {f"clipup_kernels.{name}" for name in ("__init__", "backend_info", "machine")}
FACADES |= {"clipup_kernels.self_check", "clipup_kernels.self_check_cases"}
"""Modules of a package's root that show what the rooms hold."""

INSIDE_FUNCTIONS = {
    "clipup.inference.accelerate -> clipup.clip.padding_aware": "open_clip, which SparseMoE does not need",
    "clipup.inference.accelerate -> clipup.inference.hugging_face_quantizer": "transformers, an extra",
    "clipup.inference.auto_quantizer -> clipup.inference.hugging_face_quantizer": "transformers, an extra",
    "clipup.upcycling.auto_classes -> clipup.upcycling.sparse_hugging_face": "transformers, an extra",
    "clipup.upcycling.upcycle -> clipup.upcycling.sparse_hugging_face": "transformers, an extra",
    "clipup.data.loaders -> clipup.data.streamed": "webdataset, an extra",
}
"""Imports of our own inside functions, and what each spares. Commands import what needs torch when their options are
known to be right (``tests/clipup/cli/test_commands.py``)."""


FOLDERS = ("clipup", "clipup_kernels", "studies", "benchmarks", "examples", "docs", "tests")


def modules(package: str) -> dict[str, Path]:
    paths = sorted(ROOT.joinpath(*package.split(".")).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a module imports, with whether it does so inside a function."""
    tree = ast.parse(path.read_text("utf-8"))
    inner = {id(node) for function in ast.walk(tree) if is_function(function) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            for alias in node.names:
                names = (f"{base}.{alias.name}", f"{base}.{alias.name}.__init__", base, f"{base}.__init__")
                yield from [(name, id(node) in inner) for name in names if name in known][:1]


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def room(module: str, package: str) -> str:
    return module.removeprefix(f"{package}.").rpartition(".")[0].partition(".")[0]


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_imports_only_those_before_it(package):
    order, known = ROOMS[package], modules(package)
    upward = [
        f"{module} -> {other}"
        for module, path in known.items()
        if module not in FACADES
        for other, _ in imported(module, path, known)
        if other not in FACADES and order.index(room(other, package)) > order.index(room(module, package))
    ]
    assert upward == []


def test_only_run_reads_all_options_of_a_training_run():
    known = modules("clipup.train")
    readers = {
        module
        for module, path in known.items()
        for other, _ in imported(module, path, known)
        if other == "clipup.train.train_options" and module not in ("clipup.train.__init__", other)
    }
    assert readers == {"clipup.train.run"}


@pytest.mark.parametrize("package", ROOMS)
def test_no_modules_import_each_other_in_a_circle(package):
    known = modules(package)
    arrows = {module: {other for other, _ in imported(module, path, known)} for module, path in known.items()}
    TopologicalSorter(arrows).prepare()  # a CycleError names the modules


def test_imports_inside_functions_spare_an_optional_package_or_a_slow_start():
    found = {
        f"{module} -> {other}"
        for package in ROOMS
        for module, path in modules(package).items()
        for other, inside in imported(module, path, modules(package))
        if inside and not module.startswith("clipup.cli.")
    }
    assert found == set(INSIDE_FUNCTIONS)


def test_a_file_fits_in_the_head_and_a_room_in_a_list():
    assert len(list((ROOT / "clipup").glob("*.py"))) <= 9
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    long = {path.relative_to(ROOT).as_posix() for path in paths if len(path.read_text("utf-8").splitlines()) > 400}
    rooms = Counter(path.parent.relative_to(ROOT).as_posix() for path in paths)
    wide = {room for room, count in rooms.items() if count > 20 and room.startswith("clipup")}
    assert not long | wide
