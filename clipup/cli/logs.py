"""How much commands log, and how their messages name options."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..progress import printable

FLAG_OF: dict[str, str] = {}
"""The running command's flags, by the names of their options in Python."""
_OPTION = re.compile(r"^\w+(?=: |=| (?:must|is|has|needs) )|(?<![\w./'\"-])[a-z]+_\w+(?![/'\"-]|\.\w)")
"""Words in a message that may name an option: the first word, and words with underscores outside of paths."""


@contextmanager
def errors_only() -> Iterator[None]:
    """Only errors are logged, by clipup and by the libraries it uses; the root logger's level is restored afterwards.

    For commands whose output is a table or JSON, and as a decorator of their functions too.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def in_one_line(message: str) -> str:
    """A message for the terminal: options are named as flags, and what would control the terminal is escaped."""
    return _OPTION.sub(lambda name: FLAG_OF.get(name[0], name[0]), printable(" ".join(message.split())))
