"""Tables as plain text and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from . import svg


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

    def groups(self) -> list[tuple[str, int]]:
        """Group headings in order, each with the number of columns it spans."""
        spans: list[tuple[str, int]] = []
        for one in self.columns:
            if spans and spans[-1][0] == one.group:
                spans[-1] = (one.group, spans[-1][1] + 1)
            else:
                spans.append((one.group, 1))
        return spans


def as_text(table: Table) -> str:
    """The table as text, cells right-aligned, groups above their columns."""
    first = max(map(len, table.rows))
    groups = table.groups()
    widths = [max(len(one.label), *map(len, one.cells)) for one in table.columns]
    position = 0
    for group, size in groups:  # a heading wider than its columns widens the first one
        taken = sum(widths[position : position + size]) + 2 * (size - 1)
        widths[position] += max(0, len(group) - taken)
        position += size
    tops, position = [], 0
    for group, size in groups:
        tops.append(group.rjust(sum(widths[position : position + size]) + 2 * (size - 1)))
        position += size
    lines = [" " * first + "  " + "  ".join(tops), _text_row("", [one.label for one in table.columns], first, widths)]
    lines.append("-" * len(lines[-1]))
    lines += [
        _text_row(name, [one.cells[index] for one in table.columns], first, widths)
        for index, name in enumerate(table.rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_html(table: Table, label: str) -> str:
    """The table as HTML, named ``label`` for screen readers; wide tables scroll sideways."""
    heads = svg.element("td", "") + "".join(
        svg.element("th", escape(group), colspan=size, scope="colgroup") for group, size in table.groups()
    )
    firsts = _first_of_group(table)
    labels = svg.element("td", "") + "".join(
        svg.element("th", escape(one.label), scope="col", class_="first" if index in firsts else None)
        for index, one in enumerate(table.columns)
    )
    head = svg.element("thead", svg.element("tr", heads, class_="groups"), svg.element("tr", labels))
    body = svg.element("tbody", *(_html_row(table, index, name, firsts) for index, name in enumerate(table.rows)))
    whole = svg.element("table", head, body, aria_label=label)
    return svg.element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def _html_row(table: Table, index: int, name: str, firsts: set[int]) -> str:
    cells = "".join(
        svg.element("td", escape(one.cells[index]), class_="first" if place in firsts else None)
        for place, one in enumerate(table.columns)
    )
    kind = "strong" if index in table.strong else table.classes.get(name)
    return svg.element("tr", svg.element("th", escape(name), scope="row"), cells, class_=kind)


def _first_of_group(table: Table) -> set[int]:
    places, position = set(), 0
    for _, size in table.groups():
        places.add(position)
        position += size
    return places


def _text_row(name: str, cells: Iterable[str], first: int, widths: Sequence[int]) -> str:
    return name.ljust(first) + "  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
