"""Options that are a mapping, written KEY=VALUE KEY=VALUE on the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any


class KeyValues(dict[str, Any]):
    """A mapping; the options accept any dict in its place."""

    @classmethod
    def parse(cls, texts: Iterable[str]) -> KeyValues:
        """From ``KEY=VALUE`` texts. A value that is a Python literal, such as ``(0.9, 1.0)``, becomes that; any other
        remains a string.

        Raises:
            ValueError: a text without "=".
        """
        found = cls()
        for text in texts:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise ValueError(f"expected KEY=VALUE, got {text!r}")
            try:
                found[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[key] = value
        return found

    def texts(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.items()]
