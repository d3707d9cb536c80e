"""Tables as plain text and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from .html import html
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
    return html("table", table=table, label=label)


def _flush(cells: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, cells))
    return [justify(cell, width) for cell in cells]
