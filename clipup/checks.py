"""Argument checks for public functions. Each error names the argument, its value and what was expected."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MOST_SHOWN = 200
"""Characters of a value in a message."""


def check(name: str, value: object, holds: bool, expected: str, error: type[Exception] = ValueError) -> None:
    if not holds:
        raise error(f"{name} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """A value for a message, in one line, cut if it is long."""
    text = " ".join(repr(value).split())  # tensors have several lines
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def without_numpy(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's numbers and lists, also within dicts, lists and tuples: JSON and
    checkpoints hold no others."""
    np = sys.modules.get("numpy")  # whose import the command line's help need not wait for
    if np is None:
        return value
    if isinstance(value, np.floating):
        return float(value)  # item() of a long double is a long double
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        plain = copy.copy(value)  # of the same class
        plain.clear()
        plain.update({without_numpy(key): without_numpy(of_key) for key, of_key in value.items()})
        return plain
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    return value


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    check(name, value, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def boolean(name: str, value: object) -> None:
    check(name, value, isinstance(value, bool), "True or False", TypeError)


def number(name: str, value: Any) -> None:
    """A finite int or float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    check(name, value, is_number, "a number", TypeError)
    check(name, value, abs(value) <= sys.float_info.max, "finite")


def positive_number(name: str, value: Any) -> None:
    number(name, value)
    check(name, value, value > 0, "positive")


def not_negative(name: str, value: Any) -> None:
    number(name, value)
    check(name, value, value >= 0, "0 or more")


def width(name: str, value: Any) -> None:
    check(name, value, is_int(value) and value >= 1, "a positive int")


def directory(path: str | Path, expected: str, argument: str = "") -> None:
    """A directory that exists; ``expected`` completes "expected ..."."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{argument}{': ' * bool(argument)}there is no directory {path}; expected {expected}")


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, without a byte order mark.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def read_json(path: Path, argument: str = "") -> Any:
    """The content of a JSON file.

    Args:
        argument: the argument that names the file, for the error.

    Raises:
        ValueError: not JSON, or not UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument}{': ' * bool(argument)}{path} is not valid JSON: {error}") from error


def plain_weights(name: str, model: Any) -> None:
    """Refuses what is not a module, and a model that ``clipup.accelerate`` has prepared: its packed weights are not
    parameters."""
    module(name, model)
    if any(getattr(type(module), "is_prepared", False) for module in model.modules()):
        raise ValueError(f"{name} was prepared by clipup.accelerate, for inference; pass the plain model")


def module(name: str, value: object) -> None:
    from torch import nn

    if not isinstance(value, nn.Module):
        hint = "; create it first with clipup.create_model_and_transforms" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}{hint}")
