"""Configs of upcycled transformers models, and how ``AutoModel`` finds them once clipup is imported.

Without clipup, loading must not give a dense model with random MLPs. ``model_type`` in config.json is one that
transformers does not know, and every ``hidden_act`` in it is one that no class of transformers has: it says what to do.

This module imports neither transformers nor torch: ``import clipup`` waits for neither.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPES = (
    *("clip", "clip_vision_model", "clip_text_model", "siglip", "siglip_vision_model", "siglip_text_model"),
    *("siglip2", "siglip2_vision_model", "siglip2_text_model", "vit", "dinov2", "dinov3_vit"),
    *("bert", "roberta", "xlm-roberta", "modernbert"),
)
"""transformers' names of the models that can be upcycled."""
_PREFIX = "clipup_"
_REFUSAL = "import clipup first: "
_ACTIVATIONS = ("hidden_act", "hidden_activation")


_AUTO = "transformers.models.auto.configuration_auto"
"""The module that knows all configs."""


class _SparseConfig:
    """A config of transformers with a ``moe_cfg``."""

    def to_dict(self) -> dict[str, Any]:
        """With activations that the dense model's class does not have."""
        return _changed(super().to_dict(), lambda act: act if act.startswith(_REFUSAL) else _REFUSAL + act)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What AutoModel calls before it looks the model's class up."""
        from . import sparse_hugging_face  # imports transformers, which is optional

        sparse_hugging_face.register_models(cls)
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
def sparse_config_class(dense: type) -> Any:
    """The class of the configs of upcycled models whose dense config is a ``dense``."""
    return type(
        sparse_name(dense), (_SparseConfig, dense), {"__module__": __name__, "model_type": _PREFIX + dense.model_type}
    )  # type: ignore[attr-defined]


def sparse_name(dense: type) -> str:
    return f"Sparse{dense.__name__}"


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    dense = None
    if name.startswith("Sparse") and name.endswith("Config"):
        dense = getattr(importlib.import_module("transformers"), name.removeprefix("Sparse"), None)
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sparse_config_class(dense)


def register_configs() -> None:
    """Lets transformers' AutoConfig find the configs of upcycled models: now, or when it is imported."""
    if _AUTO in sys.modules:
        _register(sys.modules[_AUTO])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(auto: Any) -> None:
    for model_type in MODEL_TYPES:
        if model_type in auto.CONFIG_MAPPING_NAMES:
            auto.CONFIG_MAPPING.register(_PREFIX + model_type, _found_when_used(auto, model_type), exist_ok=True)


def _found_when_used(auto: Any, model_type: str) -> type:
    """Stands for a config class in transformers' mapping. The class itself needs that of the dense model, which cannot be
    imported yet: this runs in the middle of transformers' imports."""

    def found() -> Any:
        return sparse_config_class(auto.CONFIG_MAPPING[model_type])

    content = {
        "model_type": _PREFIX + model_type,
        "__new__": lambda cls, *args, **kwargs: found()(*args, **kwargs),
        "from_dict": staticmethod(lambda values, **kwargs: found().from_dict(values, **kwargs)),
        "from_pretrained": staticmethod(lambda name, **kwargs: found().from_pretrained(name, **kwargs)),
    }
    return type(f"Sparse{auto.CONFIG_MAPPING_NAMES[model_type]}", (), content)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the configs as soon as transformers' module of all configs is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
