"""Configs of upcycled transformers models.

Without clipup, loading must not give a dense model with random MLPs. ``model_type`` in config.json is one that
transformers does not know, and every ``hidden_act`` in it is one that no class of transformers has: it says what to do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

PREFIX = "clipup_"
"""In front of transformers' model types."""
_REFUSAL = "import clipup first: "
_ACTIVATIONS = ("hidden_act", "hidden_activation")


class _SparseConfig:
    """A config of transformers with a ``moe_cfg``."""

    model_type: str

    def to_dict(self) -> dict[str, Any]:
        """With activations that the dense model's class does not have."""
        return _changed(super().to_dict(), lambda act: act if act.startswith(_REFUSAL) else _REFUSAL + act)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """With the dense model's activations again."""
        plain = _changed(config_dict, lambda act: act.removeprefix(_REFUSAL))
        return super().from_dict({**plain, "model_type": cls.model_type}, **kwargs)  # type: ignore[misc]


def _changed(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy with other activations, in nested configs too."""
    return {
        key: change(value)
        if key in _ACTIVATIONS and isinstance(value, str)
        else _changed(value, change)
        if isinstance(value, dict)
        else value
        for key, value in values.items()
    }


@functools.cache
def sparse_config_class(dense: Any) -> Any:
    """The class of the configs of upcycled models whose dense config is a ``dense``."""
    return type(
        sparse_name(dense), (_SparseConfig, dense), {"__module__": __name__, "model_type": PREFIX + dense.model_type}
    )  # type: ignore[attr-defined]


def sparse_name(dense: Any) -> str:
    return f"Sparse{dense.__name__}"


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    dense = None
    if name.startswith("Sparse") and name.endswith("Config"):
        dense = getattr(importlib.import_module("transformers"), name.removeprefix("Sparse"), None)
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sparse_config_class(dense)
