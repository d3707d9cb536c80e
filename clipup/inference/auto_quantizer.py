"""How transformers finds the quantizer of models in int8 once clipup is imported. This module does not import it, nor
torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..upcycling.auto_classes import after_import

_METHOD = "clipup_int8"


def register_quantizer() -> None:
    """Lets ``from_pretrained`` load models in int8: now, or when transformers is imported."""
    after_import("transformers.quantizers.auto", _register)


def _register(auto: Any) -> None:
    def quantizer(*args: Any, **kwargs: Any) -> Any:
        from .hugging_face_quantizer import (
            Int8Quantizer,  # imports transformers, in the middle of whose imports this is
        )

        return Int8Quantizer(*args, **kwargs)

    def config(values: dict[str, Any]) -> Any:
        from .hugging_face_quantizer import Int8Config

        return Int8Config(**values)

    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = SimpleNamespace(from_dict=config)
