"""Writes the page of a study from its template and its logs.

The template (``studies/icons/page.md.j2``) calls the methods of ``Tables`` for its numbers. It also has:

* ``study(NAME)``: the tables of a study whose directory is beside this one;
* ``pending(NAME)``: the names of its runs without a log; default: those of this study;
* ``by(COLUMN, FILE, NAME)``: the rows of a CSV file of its directory by the values of a column; default: of this study;
* ``saved(FILE, COLUMN, TABLES)``: a link to a CSV file in a directory beside the page, which holds several tables, told
  apart by the first column;
* ``results``: the module, for leads between any arms;
* ``hypothesis(...)`` and ``decided([...])``: what a plan asks, and what the runs say;
* ``figure(NAME, ...)``: the path of a figure beside the page, which the function of that name in ``figures`` draws.

The same logs, configs and template give the same bytes.
"""

from __future__ import annotations

import csv
import io
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2

from clipup.atomic_files import replace_files
from clipup.inspection.figures.format import MISSING

from . import config, figures, results
from .tables import Hypothesis, Table, Tables, decided

TEMPLATE = "page.md.j2"


def write(study: str | Path, out: str | Path) -> list[Path]:
    """Writes the page of a study's directory (its template and ``logs``) to ``out``, its tables and figure beside it.

    Raises:
        FileNotFoundError, ValueError: no logs, or an invalid log.
        jinja2.TemplateError: no template (an OSError too), or it fails.
    """
    study, out = Path(study).resolve(), Path(out)
    written: dict[Path, str] = {}

    @cache
    def tables_of(name: str) -> Tables:
        return Tables(results.read(study.with_name(name) / "logs"))

    def pending(name: str = study.name) -> list[str]:
        return [run for run in config.read(study.with_name(name)) if run not in tables_of(name).results]

    def by(column: str, file: str, name: str = study.name) -> dict[str, dict[str, str]]:
        with (study.with_name(name) / file).open(encoding="utf-8", newline="") as opened:
            return {row[column]: row for row in csv.DictReader(opened)}

    def saved(file: str, column: str, tables: dict[str, Table]) -> str:
        text = io.StringIO()
        head, *_ = next(iter(tables.values()))
        rows = [[value, *row] for value, (_, *rows) in tables.items() for row in rows]
        plain = [[cell.strip("*").replace(MISSING, "") for cell in row] for row in rows]
        csv.writer(text, lineterminator="\n").writerows([[column, *head], *plain])
        written[out.with_suffix("") / file] = text.getvalue()
        return f"[`{file}`]({out.stem}/{file})"

    def figure(name: str, *of: Any, **options: Any) -> str:
        path = out.with_name(f"{out.stem}_{name}.svg")
        written[path] = getattr(figures, name)(*of, **options) + "\n"
        return path.name

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(study),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    written[out] = environment.get_template(TEMPLATE).render(
        tables=tables_of(study.name),
        study=tables_of,
        pending=pending,
        by=by,
        saved=saved,
        figure=figure,
        results=results,
        hypothesis=Hypothesis,
        decided=decided,
    )
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: partial(Path.write_text, data=text, encoding="utf-8") for path, text in written.items()})
    return list(written)
