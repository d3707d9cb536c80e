"""How transformers' ``AutoConfig`` and ``AutoModel`` find upcycled models once clipup is imported.

This module imports neither transformers nor torch: ``import clipup`` waits for neither.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..clip.hugging_face_types import MODEL_TYPES, SPARSE_PREFIX
from .sparse_configs import sparse_config_class

_AUTO = "transformers.models.auto.configuration_auto"
"""The module that knows all configs."""


def register_configs() -> None:
    """Lets transformers' AutoConfig find the configs of upcycled models: now, or when it is imported."""
    if _AUTO in sys.modules:
        _register(sys.modules[_AUTO])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(auto: Any) -> None:
    for model_type in MODEL_TYPES:
        if model_type in auto.CONFIG_MAPPING_NAMES:
            auto.CONFIG_MAPPING.register(SPARSE_PREFIX + model_type, _found_when_used(auto, model_type), exist_ok=True)


def _found_when_used(auto: Any, model_type: str) -> type:
    """Stands for a config class in transformers' mapping. The class itself needs that of the dense model, which cannot
    be imported yet: this runs in the middle of transformers' imports."""

    def found() -> Any:
        from .sparse_hugging_face import register_models  # imports transformers, which is optional

        config_class = sparse_config_class(auto.CONFIG_MAPPING[model_type])
        register_models(config_class)  # AutoModel looks the model's class up as soon as the config is read
        return config_class

    content = {
        "model_type": SPARSE_PREFIX + model_type,
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
