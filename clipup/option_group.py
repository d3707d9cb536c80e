"""Options as fields of dataclasses that say what each accepts, when it has no effect, and what a change of it means."""

from __future__ import annotations

import ast
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Flag, auto
from typing import Annotated, Any

from typeguard import TypeCheckError, check_type
from tyro.constructors import PrimitiveConstructorSpec

from .checks import check, shown, without_numpy


class Resumed(Flag):
    """What a change of an option means for a run that continues from a checkpoint."""

    FREE = 0
    """It takes effect from there on, and is noted in the log."""
    CALL = auto()
    """Nothing: the option belongs to one call of the program."""
    START = auto()
    """Nothing: the option only sets weights and moments before the first step."""
    IDENTITY = auto()
    """Another run: refused without ``resume_with_changes``."""
    MEASURED = auto()
    """Evaluations before the change measured something else, as they do after a change of IDENTITY."""
    ORDER = auto()
    """Another order, choice or augmentation of samples: refused within an epoch."""
    SAMPLES = auto()
    """May change the samples: refused within an epoch of streamed data, and where indexed data have changed."""
    BATCH = auto()
    """A factor of the global batch: as SAMPLES."""
    STREAM = auto()
    """Another order of streamed data alone: refused within an epoch of such data."""


def option(
    default: Any = MISSING,
    resumed: Resumed | None = None,
    *,
    factory: Any = MISSING,
    least: float | None = None,
    positive: bool = False,
    idle: Mapping[str, Callable[[Any], bool]] | None = None,
    own_rank: bool = False,
) -> Any:
    """A field of an ``OptionGroup``.

    Args:
        resumed: what a change means for a resumed run. Every option of a training run says so.
        least, positive: smaller values, or 0 and those below, and infinite ones are refused; None is accepted.
        idle: reasons why the option has no effect, such as "without --fsdp", with a predicate on the group for each.
        own_rank: each rank may have its own value.
    """
    metadata = {"resumed": resumed, "least": least, "positive": positive, "idle": idle or {}, "own_rank": own_rank}
    return field(default=default, default_factory=factory, metadata=metadata)


@dataclass(kw_only=True)
class OptionGroup:
    """The options of one component, kept next to the code that reads them. The class docstring is their heading in the
    help."""

    def check(self) -> None:
        """Raises ValueError, naming the option, for values that are out of range or do not go together."""
        for each in fields(self):
            value, least = getattr(self, each.name), each.metadata.get("least")
            if value is not None and least is not None:
                expected = f"at least {least}{', and finite' if isinstance(value, float) else ''}"
                check(each.name, value, least <= value < math.inf, expected)
            if value is not None and each.metadata.get("positive"):
                check(each.name, value, 0 < value < math.inf, "positive, and finite")
            if isinstance(value, OptionGroup):
                value.check()

    def idle(self) -> dict[str, str]:
        """The options that have no effect beside the others of their group, by name, with the reason."""
        idle = {
            each.name: why
            for each in fields(self)
            for why, holds in each.metadata.get("idle", {}).items()
            if holds(self)
        }
        for group in vars(self).values():
            idle |= group.idle() if isinstance(group, OptionGroup) else {}
        return idle


def all_idle(group: type, why: str) -> dict[str, str]:
    """All options of a group, where none has an effect."""
    return {each.name: why for each in fields(group)}


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
