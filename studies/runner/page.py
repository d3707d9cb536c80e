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
import re
from functools import partial
from pathlib import Path

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from clipup.atomic_files import replace_files

from . import results
from .config import SUFFIX as CONFIG_SUFFIX
from .figures import figures as figures_of
from .tables import Tables

TEMPLATE, PART = "page.md.j2", "part.md.j2"
_NAME = re.compile(r"\w[\w.-]*")


def write(study: str | Path, out: str | Path) -> list[Path]:
    """Writes the page of a study's directory (its template and ``logs``) to ``out``, and its figures beside it.

    Raises:
        FileNotFoundError, ValueError: no template, no logs, an invalid log, or a template that fails or runs Python.
    """
    study, out = Path(study), Path(out)
    if not (study / TEMPLATE).is_file():
        raise FileNotFoundError(f"there is no {TEMPLATE} in {study}; name the directory of a study")
    tables = Tables(results.read(study / "logs"))
    parts: dict[str, Tables] = {}

    def other_study(name: str) -> Tables:
        if name not in parts:
            parts[name] = Tables(results.read(_beside(study, name) / "logs"))
        return parts[name]

    environment = SandboxedEnvironment(  # a study's directory may come from anyone, so its template must not run Python
        loader=jinja2.FunctionLoader(partial(_source, study)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    try:
        text = environment.get_template(TEMPLATE).render(
            tables=tables,
            study=other_study,
            by=lambda column, name, of=study.name: {row[column]: row for row in _rows(study, of, name)},
            pending=_without_log(study, tables),
            planned=len(_configs(study)),
            pending_of=lambda name: _without_log(_beside(study, name), other_study(name)),
        )
    except Exception as error:  # whatever a template does
        if isinstance(error, OSError) and not isinstance(error, jinja2.TemplateNotFound):
            raise
        raise ValueError(f"{study / TEMPLATE} cannot be rendered: {type(error).__name__}: {error}") from error
    figures = figures_of(tables) | {
        f"{name}_{key}": svg
        for name, of in parts.items()
        if _own(_beside(study, name), PART).is_file()
        for key, svg in figures_of(of).items()
    }
    written = {out.with_name(f"{out.stem}_{name}.svg"): figure + "\n" for name, figure in figures.items()} | {out: text}
    replace_files({path: partial(_write, text) for path, text in written.items()})
    return list(written)


def _configs(study: Path) -> list[str]:
    return sorted(path.stem for path in study.glob(f"*{CONFIG_SUFFIX}"))


def _without_log(study: Path, tables: Tables) -> list[str]:
    return [name for name in _configs(study) if name not in tables.results]


def _source(study: Path, name: str) -> str | None:
    """The study's own template, or the part of a study beside it."""
    other, _, file = name.rpartition("/")
    if file != (PART if other else TEMPLATE):
        return None
    path = _own(_beside(study, other) if other else study, file)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _rows(study: Path, of: str, name: str) -> list[dict[str, str]]:
    if not name.endswith(".csv"):
        raise ValueError(f"by() got {name!r}, expected the name of a CSV file of the study")
    with _own(study if of == study.name else _beside(study, of), name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _beside(study: Path, name: str) -> Path:
    """A study's directory beside another one."""
    return _own(study.resolve().parent, name)


def _own(directory: Path, name: str) -> Path:
    """A path in a directory: a template must not lead out of it, and neither must a link that came with it."""
    path = directory.resolve() / name
    if not _NAME.fullmatch(name) or path.resolve() != path:
        raise ValueError(f"{name!r} is not the name of a file or directory in {directory}")
    return path


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
