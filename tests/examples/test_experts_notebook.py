"""The notebook: it was run from top to bottom, and its code still does what its text says."""

import ast
import html
import json
import logging
import re
from functools import partial
from pathlib import Path

import pytest

from clipup.demo.pictograms import build
from clipup.evaluate.retrieval import WAYS

PATH = Path(__file__).parents[2] / "examples" / "experts.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(PATH.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_was_run_from_top_to_bottom_without_errors_and_is_small(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 8
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 1 << 20 and not re.search(r"/(home|root|work|tmp|usr)/", text)


def source_of(cell):
    return "".join(cell["source"])


def run(source, values):
    """Runs a cell; returns what a notebook would show of it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, PATH.name, "exec"), values)
    return None if last is None else eval(compile(ast.Expression(last.value), PATH.name, "eval"), values)


@pytest.fixture
def logging_as_before():
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.mark.slow
def test_its_code_upcycles_looks_and_evaluates(notebook, tmp_path, monkeypatch, logging_as_before):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    few = partial(build.build, only=lambda concept: int(concept.key.encode().hex(), 16) % 7 == 0)
    monkeypatch.setattr(build, "build", few)
    sources = list(map(source_of, code_cells(notebook)))
    (place,) = (i for i, source in enumerate(sources) if source.startswith("DATA = "))
    sources[place] = f"DATA = Path({str(tmp_path / 'data')!r})\nSTEPS, BATCH_SIZE = 20, 32"
    values = {}
    shown = [run(source, values) for source in sources]
    figures = [figure._repr_html_() for figure in shown if hasattr(figure, "_repr_html_")]
    before, after = (figure for figure in figures if "experts' cosine" in html.unescape(figure))
    assert before.count("1.000") == 16 > after.count("1.000")  # all cosines of equal experts
    assert len(figures) == 9
    results = shown[-2]
    assert set(results) == {"dense", "dense continued", "CLIP-UP"}
    assert all(0 <= numbers[f"{way}_R@1"] <= 1 for numbers in results.values() for way in WAYS)
    assert (tmp_path / "clipup-experts.html").read_text(encoding="utf-8").startswith("<!doctype html>")
