"""Parameters without weight decay.

The biases and norms of experts are stacked, [E, H], so a rule by the number of dimensions takes them for matrices.
Layers and upcycled models list them in ``no_weight_decay()``, which timm's optimizers call; ``parameter_groups`` is for
all other optimizers.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import nn

from .. import checks
from .layer import moe_layers

_WITHOUT_DECAY = re.compile(r"(?:^|[._])(?:bn|ln|bias|biases|logit_scale)\d*(?=[._]|$)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups for a ``torch.optim`` optimizer: without weight decay, then with it.

    The rule is that of open_clip 3 for AdamW: tensors of two or more dimensions decay, unless bn, ln, bias, biases or
    logit_scale is in their names, here as a word (in ``ln_1``, ``bn2`` and ``in_bias``, not in ``subnet``). So the
    matrices of experts and routers decay, and the biases and norms of experts do not. ``clipup train`` has these groups
    too, without the decay of parameters that match ``wd_exclude``, and divided by the scale of the learning rate
    (``image_layer_decay``, ``text_layer_decay``, ``moe_lr_scale``)::

        optimizer = torch.optim.AdamW(clipup.parameter_groups(model, 0.2), lr=1e-4)

    Args:
        model: any module, sparse or dense, wrapped or not. weight_decay: of the second group.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.module("model", model)
    checks.not_negative("weight_decay", weight_decay)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if not decays(name, parameter)], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if decays(name, parameter)], "weight_decay": weight_decay},
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay by the rule of ``parameter_groups``."""
    return parameter.ndim >= 2 and _WITHOUT_DECAY.search(name) is None


def add_no_weight_decay(model: nn.Module) -> None:
    """Gives a sparse model, and each of its modules that has the method already, a ``no_weight_decay()`` that adds the
    experts' biases and norms to the names it returned before."""
    for module in model.modules():
        if (module is model or hasattr(type(module), "no_weight_decay")) and set(moe_layers(module)) - {""}:
            setattr(module, "no_weight_decay", partial(_names_without_decay, module))  # noqa: B010


def _names_without_decay(module: nn.Module) -> set[str]:
    own = getattr(type(module), "no_weight_decay", None)
    names = set() if own is None else set(own(module))
    for name, layer in moe_layers(module).items():
        names |= {f"{name}.{parameter}" for parameter in layer.no_weight_decay()}
    return names
