"""How transformers and PEFT find upcycled models once clipup is imported.

This module imports neither of them, nor torch: ``import clipup`` waits for none.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..dense.transformers_models import MODEL_TYPES, SPARSE_PREFIX
from .sparse_configs import sparse_config_class


def register_upcycled() -> None:
    """Lets transformers' AutoConfig find the configs of upcycled models, and PEFT its defaults for them: now, or when
    they are imported."""
    for name, run in _REGISTERED.items():
        after_import(name, run)


def after_import(name: str, run: Callable[[Any], None]) -> None:
    """Calls a function with a module: now, or when it is imported."""
    if name in sys.modules:
        run(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, run))


def _register_configs(auto: Any) -> None:
    for model_type in MODEL_TYPES:
        if model_type in auto.CONFIG_MAPPING_NAMES:
            auto.CONFIG_MAPPING.register(
                SPARSE_PREFIX + model_type, _lazy_config_class(auto, model_type), exist_ok=True
            )


def _register_adapters(constants: Any) -> None:
    """PEFT's tables of the modules that it adapts by default. Where they name an MLP's ("output.dense"), which may be
    sparse here, PEFT asks for ``target_modules``."""
    for table in vars(constants).values():
        for name in MODEL_TYPES if isinstance(table, dict) else ():
            if name in table and "dense" not in str(table[name]):
                table[SPARSE_PREFIX + name] = table[name]


def _use_auto_model(dual_encoder: Any) -> None:
    """transformers makes a dense CLIPVisionModel of every config derived from CLIP's, and asks AutoModel for others."""
    dual_encoder.CLIPVisionConfig = ()


def _lazy_config_class(auto: Any, model_type: str) -> type:
    """Stands for a config class in transformers' mapping until it is used. The class itself needs that of the dense
    model, which cannot be imported yet: this runs in the middle of transformers' imports."""

    def config_class() -> Any:
        from .sparse_hugging_face import register_models  # imports transformers, which is optional

        sparse_class = sparse_config_class(auto.CONFIG_MAPPING[model_type])
        register_models(sparse_class)  # AutoModel looks the model's class up as soon as the config is read
        return sparse_class

    content = {
        "model_type": SPARSE_PREFIX + model_type,
        "__new__": lambda cls, *args, **kwargs: config_class()(*args, **kwargs),
        "from_dict": staticmethod(lambda values, **kwargs: config_class().from_dict(values, **kwargs)),
        "from_pretrained": staticmethod(lambda name, **kwargs: config_class().from_pretrained(name, **kwargs)),
        "register_for_auto_class": staticmethod(lambda: None),  # it would save this package's source files
    }
    return type(f"Sparse{auto.CONFIG_MAPPING_NAMES[model_type]}", (), content)


_REGISTERED: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder": _use_auto_model,
    "peft.utils.constants": _register_adapters,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers as soon as a module is imported."""

    def __init__(self, module: str, register: Callable[[Any], None]) -> None:
        self.module, self.register = module, register

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                self.register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
