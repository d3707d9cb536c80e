"""The repository's Markdown as tests read it: fenced blocks, tables, inline code, headings and links."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]

_FENCED = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")  # may continue on the next line, not in the next paragraph
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in order."""
    found = (Block(language, textwrap.dedent(text)) for _, language, text in _FENCED.findall(page.read_text("utf-8")))
    return [block for block in found if block.language in languages]


def tables(page: Path) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, without emphasis, the head first."""
    found = [table.splitlines() for table in re.findall(r"(?:^\|.*\|$\n?)+", _prose(page), re.MULTILINE)]
    return [
        [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in (head, *rows)]
        for head, _, *rows in found
    ]


def inline_code(page: Path) -> list[str]:
    """The code in single backticks in the text of a page."""
    return [" ".join(code.split()) for code in _INLINE.findall(_prose(page))]


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page as words, without comments and leading variables: those of its bash blocks,
    and inline ones that have options and no ellipsis."""
    inline = [code for code in inline_code(page) if re.fullmatch(r"clipup (?!.*\.\.\.)[^|\[]* --[^|\[]*", code)]
    lines = [line for block in blocks(page, "bash") for line in block.text.replace("\\\n", " ").splitlines()]
    for line in [*lines, *inline]:
        words = shlex.split(re.sub(r"^(\w+=\S* +)+", "", line), comments=True)
        if words:
            yield words


def commands_of(page: Path, program: str) -> Iterator[list[str]]:
    """The arguments of every command of a page that runs ``program``, also as ``python -m`` or under torchrun."""
    for words in commands(page):
        if words[0] == program:
            yield words[1:]
        elif words[0] in ("python", "torchrun") and program in words:
            yield [word for word in words[words.index(program) + 1 :] if word != "--"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = [heading.strip().lower() for heading in _HEADING.findall(_prose(page))]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The links of a page whose file or heading does not exist."""
    links = [link for link in _LINK.findall(_INLINE.sub("", _prose(page))) if not re.match(r"https?:|mailto:", link)]
    return [link for link in links if not _leads_somewhere(page, *link.partition("#")[::2])]


def _leads_somewhere(page: Path, target: str, anchor: str) -> bool:
    path = page.parent / target if target else page
    return path.exists() and (not anchor or anchor in anchors(path))


def _prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text("utf-8"))
