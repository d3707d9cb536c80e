"""Loads the models in int8 that ``saving`` writes (``clipup.inference.int8_tensors``)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..clip.padding_aware import make_padding_aware
from ..inference.int8_tensors import places, stored_layers, values_of
from ..inference.prepared import Prepared
from ..inference.replacement import replace_layers
from .state_dicts import check_tensors


def load_int8(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> nn.Module:
    """Turns a plain model on the meta device into the accelerated one of these tensors.

    Args:
        config: ``int8_config``.
        tensors: ``int8_tensors``, perhaps memory-mapped: they are copied. Emptied.
        source: where they come from, for messages.

    Raises:
        ValueError: they do not fit the model.
        RuntimeError: no kernel here multiplies int8.
    """
    make_padding_aware(model)
    chosen, sources = {}, {}
    for prefix, layer in stored_layers(model, config, source).items():
        expected = {prefix + name: tensor for name, tensor in layer.expected().items()}
        own = {name: tensors.pop(name) for name in expected if name in tensors}
        check_tensors(expected, own, source, exact=True)
        chosen[layer.plain] = layer.kind
        sources[layer.plain] = layer.stored({name.removeprefix(prefix): tensor for name, tensor in own.items()})
    model = replace_layers(model, chosen, "int8", sources)
    wanted = {number: place for number, place in values_of(model).items() if place[1].is_meta}
    check_tensors(dict(wanted.values()), tensors, source)
    values = {number: tensors.pop(name).clone() for number, (name, _) in wanted.items()}
    for _, own, key in list(places(model)):
        if (value := values.get(id(own[key]))) is not None:
            own[key] = nn.Parameter(value, False) if isinstance(own[key], nn.Parameter) else value
    return model


def plain_structure(model: nn.Module) -> nn.Module:
    """The plain model of a prepared one, on the meta device."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.to("meta")) if isinstance(value, nn.Parameter) else value.to("meta")
        for value in (*model.parameters(), *model.buffers())
    }
    model = copy.deepcopy(model, memo)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Prepared):
                module._modules[name] = child.plain()
    return model
