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
    said, numbered = set(name.split()), re.search(r"\d", name)
    return [
        alias
        for alias in dict.fromkeys(map(words, aliases))
        if len(alias) >= 3
        and alias != name
        and alias not in _NOT_NAMES
        and (numbered or not re.search(r"\d", alias))
        and not {"black", "white"} & set(alias.split()) - said
    ]


def useful_tags(name: str, tags: Iterable[str]) -> list[str]:
    """The first tags that are words and add a word to `name`, cleaned; at most `MAX_TAGS`."""
    plain = (tag for tag in tags if re.fullmatch(r"[A-Za-z][A-Za-z '\-]+", tag.strip()))
    kept = [
        tag
        for tag in dict.fromkeys(map(words, plain))
        if len(tag) >= 3 and tag not in _UNINFORMATIVE_TAGS and not set(tag.split()) <= set(name.split())
    ]
    return kept[:MAX_TAGS]


def caption_set(names: Sequence[str], tags: Sequence[str]) -> tuple[str, ...]:
    """Names first, then the first name with each tag: `("acorn", "acorn, nut")`."""
    return tuple(dict.fromkeys([*names, *(f"{names[0]}, {tag}" for tag in tags)]))


def place(*parts: str) -> float:
    """A number in [0, 1), uniform over names, that depends on the arguments alone."""
    digest = hashlib.sha256(":".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
