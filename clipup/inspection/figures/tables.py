"""Tables as plain text and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from . import svg
from .svg import Figure


@dataclass(frozen=True)
class Column:
    """Adjacent columns with the same ``group`` share one heading."""

    group: str
    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table with named rows and grouped columns.

    ``strong``: indices of emphasized rows. ``classes``: CSS classes of other rows, by name.
    """

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    strong: frozenset[int] = frozenset()
    classes: Mapping[str, str] = field(default_factory=dict)

    def groups(self) -> list[tuple[str, list[Column]]]:
        """Group headings in order, each with its columns."""
        return [(name, list(columns)) for name, columns in groupby(self.columns, key=lambda column: column.group)]


def as_text(table: Table) -> str:
    """The table as text, cells right-aligned, groups above their columns."""
    blocks = [_flush(["", "", *table.rows], str.ljust)]
    for group, columns in table.groups():
        cells = [_flush([column.label, *column.cells], str.rjust) for column in columns]
        blocks.append(_flush([group, *map("  ".join, zip(*cells, strict=True))], str.rjust))
    groups, labels, *rows = ["  ".join(line).rstrip() for line in zip(*blocks, strict=True)]
    return "\n".join([groups, labels, "-" * len(labels), *rows])


def as_html(table: Table, label: str) -> Figure:
    """The table as HTML, named ``label`` for screen readers; wide tables scroll sideways."""
    starts = [None if place else "first" for _, columns in table.groups() for place in range(len(columns))]
    of_columns = list(zip(table.columns, starts, strict=True))
    empty = svg.element("td", "")
    groups = [
        svg.element("th", escape(group), colspan=len(columns), scope="colgroup") for group, columns in table.groups()
    ]
    labels = [svg.element("th", escape(column.label), scope="col", class_=start) for column, start in of_columns]
    body = []
    for index, name in enumerate(table.rows):
        kind = "strong" if index in table.strong else table.classes.get(name)
        cells = [svg.element("td", escape(column.cells[index]), class_=start) for column, start in of_columns]
        body.append(svg.element("tr", svg.element("th", escape(name), scope="row"), *cells, class_=kind))
    head = svg.element("thead", svg.element("tr", empty, *groups, class_="groups"), svg.element("tr", empty, *labels))
    whole = svg.element("table", head, svg.element("tbody", *body), aria_label=label)
    return Figure(svg.element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label))


def _flush(cells: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, cells))
    return [justify(cell, width) for cell in cells]
