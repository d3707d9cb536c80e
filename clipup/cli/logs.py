"""How much commands log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
