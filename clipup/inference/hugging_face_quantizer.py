"""How transformers saves and loads models in int8: ``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` are its
own, and call this quantizer. ``auto_quantizer`` registers it.

While transformers loads, a module with the stored tensors is in the place of each layer in int8, so that no plain
weights are created.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..clip.hugging_face import is_hugging_face
from ..clip.padding_aware import make_padding_aware
from ..moe.experts import Experts
from .int8_tensors import StoredLayer, int8_config, int8_dtype, int8_tensors, stored_layers
from .prepared import Prepared, quantization
from .replacement import replace_layers, replace_module


class Int8Config(QuantizationConfigMixin):
    """``int8_config`` as attributes."""

    quant_method: Any

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Int8Quantizer(HfQuantizer):
    """Of a model that ``accelerate`` made, or that is being loaded."""

    requires_calibration = True
    """A plain model is not quantized while it is loaded."""
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses another version's model, and devices other than the CPU."""
        self.dtype = int8_dtype(self.quantization_config.to_dict(), "config.json")
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if others := {str(device) for device in devices if device is not None} - {"cpu", "auto"}:
            raise ValueError(
                f"device_map has {others.pop()}, but the model's weights are int8, for the CPU; leave it out"
            )

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map == "auto" else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype  # that of a config of transformers may be of the model before a cast

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """None: tensors keep their types."""

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {id(getattr(module, "config", None)): module for module in reversed([*model.modules()])}
        for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
            if quantization(part := parts.get(id(config), nn.Module())):
                config.quantization_config = Int8Config(**int8_config(part))  # classes of towers read theirs alone
        tensors = int8_tensors(model)
        for path, module in model.named_modules():
            if isinstance(module, Prepared):
                for name, plain in module.plain().named_parameters():  # refused by transformers without clipup
                    tensors.setdefault(f"{path}.{name}".lstrip("."), torch.empty(*plain.shape[:-1], 0))
            for name in () if isinstance(module, Prepared) else module._non_persistent_buffers_set:
                tensors.pop(f"{path}.{name}".lstrip("."), None)  # transformers computes them
        return tensors, {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        layers = stored_layers(model, _renamed(self.quantization_config.to_dict(), model), "config.json")
        self.holders: list[tuple[str, StoredLayer, nn.Module]] = []
        for prefix, layer in layers.items():
            holder = nn.Module()
            if isinstance(layer.plain, Experts):
                holder._modules = layer.plain._modules
            for name, value in layer.plain.named_parameters(recurse=False):
                value._is_hf_initialized = True  # type: ignore[attr-defined]
                vars(holder)[name] = value  # some families' initialization reads it, and leaves it
            for name, tensor in layer.expected().items():
                vars(holder).pop(name, None)
                holder.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            replace_module(model, layer.plain, holder)
            self.holders.append((prefix, layer, holder))
            ignored = {rf"\b{re.escape(name)}$" for name, _ in layer.plain.named_parameters(prefix.split(".")[-2])}
            model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        chosen, sources = {}, {}
        while self.holders:  # the memory of its tensors is free before the next ones are packed
            prefix, layer, holder = self.holders.pop(0)
            for name, expected in layer.expected().items():
                value = holder.get_parameter(name)
                found = str(value.dtype) if getattr(value, "_is_hf_initialized", False) else "missing"
                if found != str(expected.dtype):
                    raise ValueError(f"{prefix}{name} is {found} in the file; config.json asks for {expected.dtype}")
            replace_module(model, holder, layer.plain)
            tensors = {name: value.detach() for name, value in holder.named_parameters(recurse=False)}
            del holder
            chosen[layer.plain], sources[layer.plain] = layer.kind, layer.stored(tensors)
        make_padding_aware(model)
        model = replace_layers(model, chosen, "int8", sources)
        let_transformers_save(model)
        return model


def let_transformers_save(model: nn.Module) -> None:
    """Lets ``save_pretrained`` write what ``accelerate`` made: of the model, of its towers, or inside a wrapper."""
    for part in model.modules():
        if is_hugging_face(part):
            cast(Any, part).hf_quantizer = Int8Quantizer(Int8Config())


def _renamed(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``int8_config`` with the names of this model's layers: transformers also loads a base model or a tower from a
    model with more around it, whose names have a prefix, and the other way round."""
    own = [name for name, _ in model.named_modules() if name]

    def renamed(name: str) -> str:
        alike = (other for other in own if f".{name}".endswith(f".{other}") or other.endswith(f".{name}"))
        return name if name in own else max(alike, key=len, default=name)

    return config | {"layers": {renamed(name): error for name, error in config["layers"].items()}}
