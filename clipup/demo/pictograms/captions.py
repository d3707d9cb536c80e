"""Captions of a pictogram: words from its name, its other names and its tags.

A caption set is ordered: the name first, then other names, then "name, tag". A tag is never a caption alone, because it
fits many pictures ("arrowhead" fits 119 icons) and a caption should identify one. No caption mentions how a picture was
drawn (source or stroke weight), because that would separate the renderings of one concept. Everything is lower case,
without punctuation except the comma before a tag.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_TAGS = 4

_NOT_NAMES = frozenset({"shit", "hankey", "harambe", "facepunch"})
_UNINFORMATIVE_TAGS = frozenset(
    "emoji emojis icon icons new updated other symbol symbols object objects neutral skeptical geographic prepared "
    "alphanum single partial fingers body parts person people role activity ground asian".split()
)
_SIGNS = {"#": " number sign ", "*": " asterisk ", "&": " and ", "+": " plus "}


def words(name: str) -> str:
    """A name from a package (":face_with_tears_of_joy:", "arrow-bend-up-left") as lower-case words."""
    for sign, word in _SIGNS.items():
        name = name.replace(sign, word)
    letters = unicodedata.normalize("NFKD", name.replace("’", "'"))
    letters = "".join(c for c in letters if not unicodedata.combining(c)).lower()
    return re.sub(r"[^a-z0-9]+", " ", letters.replace("'", "")).strip()


def same_words(caption: str) -> tuple[str, ...]:
    """A key that is equal for captions with the same words in any order ("waving hand", "hand waving")."""
    return tuple(sorted(caption.replace(",", " ").split()))


def other_names(name: str, aliases: Iterable[str]) -> list[str]:
    """The aliases that can be captions beside `name`: cleaned, without duplicates, in their order.

    Left out are aliases of less than three letters ("o", "ng"), numbered variants ("clock830", "cat2", "u6708"), and
    colours that old Unicode names use for outlined and solid ("white heavy check mark" is green).
    """
    kept: list[str] = []
    for alias in (words(a) for a in aliases):
        numbered = re.search(r"\d", alias) and not re.search(r"\d", name)
        colour = {"black", "white"} & set(alias.split()) - set(name.split())
        if len(alias) < 3 or numbered or colour or alias in _NOT_NAMES or alias == name or alias in kept:
            continue
        kept.append(alias)
    return kept


def useful_tags(name: str, tags: Iterable[str], limit: int = MAX_TAGS) -> list[str]:
    """The first `limit` tags that are words and add a word to `name`, cleaned."""
    known = set(name.split())
    kept: list[str] = []
    for tag in tags:
        if "*" in tag or not re.fullmatch(r"[A-Za-z][A-Za-z '\-]+", tag.strip()):
            continue
        cleaned = words(tag)
        if len(cleaned) < 3 or cleaned in _UNINFORMATIVE_TAGS or set(cleaned.split()) <= known or cleaned in kept:
            continue
        kept.append(cleaned)
    return kept[:limit]


def caption_set(names: Sequence[str], tags: Sequence[str]) -> tuple[str, ...]:
    """Names first, then the first name with each tag: `("acorn", "acorn, nut")`."""
    return tuple(dict.fromkeys([*names, *(f"{names[0]}, {tag}" for tag in tags)]))


def place(*parts: str) -> float:
    """A number in [0, 1), uniform over names, that depends on the arguments alone."""
    digest = hashlib.sha256(":".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
