"""Writes the page of a study from its template and its logs.

The template (``studies/icons/page.md.j2``) calls the methods of ``Tables``, and ``by(COLUMN, FILE)`` for the rows of a
CSV file beside it by the values of a column; ``pending`` are the runs without a log, ``planned`` is the number of runs.
``study(NAME)`` are the tables of a study whose directory is beside this one, ``by(COLUMN, FILE, NAME)`` rows of its
files, ``pending_of(NAME)`` its runs without a log, and ``NAME/part.md.j2`` is what it adds to the page, to be included.
Figures are written beside the page, those of another study if it has such a part. The same logs, configs and template
give the same bytes.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import jinja2

from clipup.atomic_files import replace_files

from . import results
from .config import SUFFIX
from .figures import figures
from .tables import Tables

TEMPLATE, PART = "page.md.j2", "part.md.j2"


def write(study: str | Path, out: str | Path) -> list[Path]:
    """Writes the page of a study's directory (its template and ``logs``) to ``out``, and its figures beside it.

    Raises:
        FileNotFoundError, ValueError: no logs, or an invalid log.
        jinja2.TemplateError: no template (an OSError too), or it fails.
    """
    study, out = Path(study).resolve(), Path(out)
    shown: dict[str, Tables] = {}

    def tables_of(name: str) -> Tables:
        if name not in shown:
            shown[name] = Tables(results.read(study.with_name(name) / "logs"))
        return shown[name]

    def configs(name: str) -> list[str]:
        return sorted(path.stem for path in study.with_name(name).glob(f"*{SUFFIX}"))

    def pending(name: str) -> list[str]:
        return [run for run in configs(name) if run not in tables_of(name).results]

    def rows(column: str, file: str, name: str = study.name) -> dict[str, dict[str, str]]:
        with (study.with_name(name) / file).open(encoding="utf-8", newline="") as opened:
            return {row[column]: row for row in csv.DictReader(opened)}

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(study.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    texts = {
        out: environment.get_template(f"{study.name}/{TEMPLATE}").render(
            tables=tables_of(study.name),
            study=tables_of,
            by=rows,
            pending=pending(study.name),
            planned=len(configs(study.name)),
            pending_of=pending,
        )
    }
    for name, tables in shown.items():
        prefix = "" if name == study.name else f"{name}_"
        if not prefix or (study.with_name(name) / PART).is_file():
            for key, figure in figures(tables).items():
                texts[out.with_name(f"{out.stem}_{prefix}{key}.svg")] = figure + "\n"
    replace_files({path: partial(Path.write_text, data=text, encoding="utf-8") for path, text in texts.items()})
    return list(texts)
