"""What groups of options are made of: checks of ranges and types, and mappings."""

from __future__ import annotations

import ast
import inspect
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from typeguard import TypeCheckError, check_type
from tyro.constructors import PrimitiveConstructorSpec

from ...checks import check, shown, without_numpy


@dataclass(kw_only=True)
class OptionGroup:
    """Options about one thing. Its class docstring is shown above them in ``clipup train --help``."""

    def check(self) -> None:
        """Raises ValueError, naming the option, for values that are out of range or do not go together."""

    def at_least(self, least: int, *names: str) -> None:
        """Refuses smaller and infinite values of these options; None is accepted."""
        for name in names:
            value = getattr(self, name)
            check(name, value, value is None or least <= value < math.inf, f"at least {least}, and finite")

    def positive(self, *names: str) -> None:
        """Refuses values of 0, below and infinite; None is accepted."""
        for name in names:
            value = getattr(self, name)
            check(name, value, value is None or 0 < value < math.inf, "positive, and finite")


def key_values(texts: Iterable[str]) -> dict[str, Any]:
    """From ``KEY=VALUE`` texts. A value that is a Python literal, such as ``(0.9, 1.0)``, becomes that; any other
    remains a string.

    Raises:
        ValueError: a text without "=".
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"expected KEY=VALUE, got {text!r}")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return values


KeyValues = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=key_values,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={of_key}" for key, of_key in value.items()],
    ),
]
"""A mapping, on the command line written KEY=VALUE KEY=VALUE, as open_clip_train does."""


def conform(name: str, value: Any, hint: Any) -> Any:
    """The value of an option: numbers and arrays of numpy as Python's, paths as strings, lists as tuples.

    Raises:
        TypeError: it is not of the annotated type, or none of its choices.
    """
    value = without_numpy(value)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = tuple(value) if isinstance(value, list) else value
    try:
        return check_type(value, hint)
    except TypeCheckError as error:
        raise TypeError(f"{name} must be {inspect.formatannotation(hint)}, got {shown(value)}") from error
