"""What Chinese characters mean in English, from the Unihan database of Debian's package unicode-data."""

from __future__ import annotations

import bz2
import re
from pathlib import Path

FILE = "usr/share/unicode/Unihan_Readings.txt.bz2"
"""In the unpacked package."""
_SENSES = 3
_LEFT_OUT = re.compile(
    "variant|same as|old form|ancient form|form of|standard form|simplified|non-standard|interchangeable|corrupted|"
    r"vulgar|abbrev|(a )?surname|see |used in|.*(U\+|[^\x00-\x7f])",
    re.IGNORECASE,
)
"""Senses that tell how a character is written or named, or refer to another one."""


def read_definitions(package: Path) -> dict[str, str]:
    """By character: its first three senses, without those that say only how it is written; none of these, no entry.

    Raises:
        FileNotFoundError: ``package`` is not Debian's unicode-data, unpacked.
    """
    lines = bz2.decompress((package / FILE).read_bytes()).decode().splitlines()
    fields = (line.split("\t") for line in lines if "\tkDefinition\t" in line)
    definitions = {chr(int(code.removeprefix("U+"), 16)): _plain(text) for code, _, text in fields}
    return {character: text for character, text in definitions.items() if text}


def _plain(definition: str) -> str:
    senses = (re.sub(r"\([^)]*\)", "", sense).strip(" ,") for sense in definition.split(";"))
    return "; ".join([sense for sense in senses if sense and not _LEFT_OUT.match(sense)][:_SENSES])
