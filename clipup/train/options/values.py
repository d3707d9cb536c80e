"""The values that options take, by their annotations."""

from __future__ import annotations

import os
import types
import typing
from typing import Any, Literal, Union

from ...checks import check, without_numpy

_MAY_BE_INFINITE = ("opt_kwargs",)
"""Options that check this themselves."""
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "None",
}


def conform(name: str, value: Any, hint: Any) -> Any:
    """The value of an option, as its annotation has it: numbers and arrays of numpy as Python's, paths as strings, and
    for a tuple also a list, or one number in place of several.

    Raises:
        TypeError, ValueError: it is of another type, none of the choices, or not finite; or it is a dict with what JSON
            does not have, and options.json could not.
    """
    given = value = without_numpy(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not _fits(value, hint):
        value = _as_tuple(value, hint)
    if not _fits(value, hint):
        choices = [one for one in _alternatives(hint) if typing.get_origin(one) is Literal]
        error = ValueError if choices and isinstance(value, str) else TypeError
        check(name, given, False, " or ".join(map(_described, _alternatives(hint))), error)
    if isinstance(value, dict):
        for key, of_key in value.items():
            check(f"a key of {name}", key, isinstance(key, str), "a string", TypeError)
            expected = "a value of JSON (None, a string, a number, a list or dict of these)"
            check(f"{name}[{key!r}]", of_key, _is_json(of_key), expected, TypeError)
    if name not in _MAY_BE_INFINITE:
        check(name, value, is_finite(value), "finite in float32")
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return any(_fits(value, one) for one in alternatives)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        of_items = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        return isinstance(value, tuple) and len(value) == len(of_items) and all(map(_fits, value, of_items))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, dict if issubclass(hint, dict) else hint)


def _as_tuple(value: Any, hint: Any) -> Any:
    """A list, or a number where several may be given, as a tuple; anything else as it is."""
    if isinstance(value, list):
        return tuple(value)
    several = any(typing.get_args(one)[1:] == (...,) for one in _alternatives(hint))
    return (value,) if several and isinstance(value, int | float) else value


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a tuple of {count}{_WORDS[arguments[0]].removeprefix('a ')}s"
    return _WORDS.get(hint, "a dict" if issubclass(hint, dict) else f"a {hint.__name__}")


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(of_key) for key, of_key in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)


def is_finite(value: Any) -> bool:
    """Whether a value and all within it, as far as they are numbers, are finite in float32, in which most are used."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, int | float) or abs(value) <= _LARGEST
