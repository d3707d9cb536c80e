"""Classes of upcycled transformers models: ``SparseCLIPModel``, ``SparseViTForImageClassification`` and so on.

``upcycle`` gives a model a subclass of its class, and its config a subclass of its config's class, with the config of
the sparse layers as ``moe_cfg``. ``save_pretrained`` and ``from_pretrained`` are transformers' own; so are ``Trainer``
and everything else. ``AutoModel`` and its relatives know the classes once clipup is imported (``auto_classes``).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
import transformers
from transformers.models.auto import modeling_auto

from ..moe.config import MoEConfig
from ..moe.layer import aux_loss
from .sparse_blocks import make_sparse
from .sparse_configs import sparse_config_class, sparse_name


def adopt(model: Any, config: MoEConfig) -> None:
    """Gives an upcycled model and its config the classes that save and load them."""
    dense, dense_config = (cast(Any, type(one)) for one in (model, model.config))
    config_class = sparse_config_class(dense_config)
    model.config.__class__ = config_class
    model.config.model_type = config_class.model_type
    model.config.moe_cfg = config.to_dict()
    model.__class__ = sparse_model_class(dense)
    register_models(config_class)


class _SparseModel:
    """A model of transformers with sparse layers, as its config's ``moe_cfg`` says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "moe_cfg", None) is None:
            raise ValueError(
                f"config has no moe_cfg, which says what is sparse in a {type(self).__name__}; expected the config of "
                "an upcycled model: clipup.upcycle a dense model"
            )
        make_sparse(self, MoEConfig.from_dict(config.moe_cfg))  # type: ignore[arg-type]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's forward. In training, a loss that it returns includes the weighted losses of the sparse
        layers (``clipup.aux_loss``); where it returns none, they are left to the caller."""
        as_dict = kwargs.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict  # type: ignore[attr-defined]
        outputs = super().forward(*args, return_dict=True, **kwargs)  # type: ignore[misc]
        if self.training and torch.is_grad_enabled() and getattr(outputs, "loss", None) is not None:  # type: ignore[attr-defined]
            outputs.loss = outputs.loss + aux_loss(self).to(outputs.loss.device)  # type: ignore[arg-type]
        return outputs if as_dict else outputs.to_tuple()


@functools.cache
def sparse_model_class(dense: Any) -> Any:
    """The class of the models that are upcycled from a ``dense``."""

    @functools.wraps(dense.forward)  # Trainer reads the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _SparseModel._forward(self, *args, **kwargs)

    content = {
        "__module__": __name__,
        "__doc__": f"transformers' {dense.__name__}, upcycled: MLPs of some blocks are sparse layers.",
        "config_class": sparse_config_class(dense.config_class),  # type: ignore[attr-defined]
        "forward": forward,
    }
    return type(sparse_name(dense), (_SparseModel, dense), content)


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    dense: Any = getattr(transformers, name.removeprefix("Sparse"), None) if name.startswith("Sparse") else None
    if inspect.isclass(dense) and issubclass(dense, transformers.PreTrainedModel):
        return sparse_model_class(cast(Any, dense))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def register_models(config_class: Any) -> None:
    """Lets every Auto class of transformers that knows the dense model find the sparse one. This imports the model's
    module, so it is done when such a config is read."""
    dense_config = config_class.__mro__[2]
    for name in dir(modeling_auto):
        auto: Any = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not inspect.isclass(auto) or mapping is None or dense_config not in mapping:
            continue
        dense: Any = mapping[dense_config]
        if not isinstance(dense, tuple):  # of several classes, transformers takes the one that the config names
            cast(Any, auto).register(config_class, sparse_model_class(dense), exist_ok=True)
