"""Numbers that depend on names alone, to decide who is held out: every machine and every run agrees."""

from __future__ import annotations

import hashlib


def place(*parts: str) -> float:
    """A number in [0, 1), evenly spread over names, that depends on nothing but its arguments."""
    digest = hashlib.sha256(":".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
