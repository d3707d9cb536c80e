"""The repository's Markdown as tests read it: fenced blocks, code in the text, headings and links."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]

_FENCED = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")  # may go on in the next line, not in the next paragraph
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in their order."""
    found = (Block(language, textwrap.dedent(text)) for _, language, text in _FENCED.findall(page.read_text("utf-8")))
    return [block for block in found if block.language in languages]


def inline_code(page: Path) -> list[str]:
    """What stands in single backticks in the text of a page."""
    return [" ".join(code.split()) for code in _INLINE.findall(_prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    seen: dict[str, int] = {}
    for heading in _HEADING.findall(_prose(page)):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        seen[anchor] = seen.get(anchor, -1) + 1
        if seen[anchor]:
            seen[f"{anchor}-{seen[anchor]}"] = 0
    return set(seen)


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead to no file of the repository, or to no heading of a page."""
    links = [link for link in _LINK.findall(_INLINE.sub("", _prose(page))) if not re.match(r"https?:|mailto:", link)]
    return [link for link in links if not _leads_somewhere(page, *link.partition("#")[::2])]


def _leads_somewhere(page: Path, target: str, anchor: str) -> bool:
    path = page.parent / target if target else page
    return path.exists() and (not anchor or anchor in anchors(path))


def _prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text("utf-8"))
