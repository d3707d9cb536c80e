"""The values that options take, by their annotations."""

from __future__ import annotations

import math
import os
import types
import typing
from typing import Any, Literal, Union

from ...checks import check, without_numpy


def conform(name: str, value: Any, hint: Any) -> Any:
    """The value of an option, as its annotation has it: numbers and arrays of numpy as Python's, paths as strings, and
    for a tuple also a list, or one number in place of several.

    Raises:
        TypeError, ValueError: it is of another type, none of the choices, or a number that is not finite.
    """
    value = without_numpy(value)
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, int | float) and any(typing.get_args(one)[1:] == (...,) for one in alternatives):
        value = (value,)
    if not any(_fits(value, one) for one in alternatives):
        choices = [one for one in alternatives if typing.get_origin(one) is Literal]
        error = ValueError if choices and isinstance(value, str) else TypeError
        check(name, value, False, " or ".join(map(_described, alternatives)), error)
    for number in value if isinstance(value, tuple) else (value,):
        check(name, value, not isinstance(number, float) or math.isfinite(number), "finite")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        kind, *others = typing.get_args(hint)
        right_length = others == [...] or isinstance(value, tuple) and len(value) == 1 + len(others)
        return isinstance(value, tuple) and right_length and all(_fits(one, kind) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else dict if issubclass(hint, dict) else hint)


def _described(hint: Any) -> str:
    choices = typing.get_args(hint)
    return (
        f"one of {', '.join(choices)}" if typing.get_origin(hint) is Literal else getattr(hint, "__name__", str(hint))
    )
