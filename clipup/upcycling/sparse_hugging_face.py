"""Classes of upcycled transformers models: ``SparseCLIPModel``, ``SparseViTForImageClassification`` and so on.

``upcycle`` gives a model a subclass of its class, and its config a subclass of its config's class, with the config of
the sparse layers as ``moe_cfg``. ``save_pretrained`` and ``from_pretrained`` are transformers' own; so are ``Trainer``
and everything else. ``AutoModel`` and its relatives know the classes once clipup is imported (``auto_classes``).
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, modeling_utils
from transformers.models.auto import modeling_auto

from ..clip.hugging_face import hugging_face_blocks
from ..clip.towers import with_towers
from ..moe.config import MoEConfig
from ..moe.experts import Experts
from ..moe.layer import aux_loss, moe_layers, saved_config
from ..moe.router import Router
from .sparse_blocks import make_sparse
from .sparse_configs import sparse_config_class, sparse_name

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        f"sparse models of transformers need version 5 of it or newer, and {transformers.__version__} is installed: "
        'pip install "transformers>=5"'
    ) from error


def check_classes(model: nn.Module) -> None:
    """
    Raises:
        TypeError: the model, a model of transformers in it, or its config is of a class derived from transformers',
            whose overrides an upcycled one would not have.
    """
    models = {name or "the model": part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    for name, part in models.items():
        for what, thing in ((name, part), (f"the config of {name}", part.config)):
            if not type(thing).__module__.startswith("transformers."):
                raise TypeError(
                    f"{what} is a {type(thing).__qualname__} of {type(thing).__module__}, which derives from "
                    f"transformers' {_dense_class(thing).__name__} and may compute something else; upcycle a model of "
                    "transformers' own class"
                )


def adopt(model: Any, config: MoEConfig) -> None:
    """Gives the classes that save and load sparse layers to an upcycled model, to each public model of transformers in
    it that has such layers, and to their configs."""
    new: dict[int, Any] = {}  # several modules of a model share a config
    for name, module in reversed(list(model.named_modules())):  # a model's own config last: it holds those of its parts
        public = isinstance(module, PreTrainedModel) and hasattr(transformers, _dense_class(module).__name__)
        if public and moe_layers(module):
            blocks = hugging_face_blocks(module)
            part = config.replace(towers=tuple(tower for tower in config.towers if tower in blocks))
            _adopt(module, part, new, is_root=not name)
    for module in model.modules():
        if isinstance(module, Experts | Router):
            module.holds_values = not next(module.parameters()).is_meta  # type: ignore[assignment]


def _adopt(model: Any, config: MoEConfig, new: dict[int, Any], is_root: bool) -> None:
    old = model.config
    if id(old) not in new:
        config_class = sparse_config_class(cast(Any, _dense_class(old)))
        sparse = copy.copy(old)  # the model may share its config with others
        sparse.__class__ = config_class
        sparse.model_type = config_class.model_type
        for name in ("text_config", "vision_config"):
            if id(part := getattr(sparse, name, None)) in new:
                setattr(sparse, name, new[id(part)])
        new[id(old)] = new[id(sparse)] = sparse
        register_models(config_class)
    sparse = new[id(old)]
    sparse.moe_cfg = config.to_dict()
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = sparse
    model.__class__ = sparse_model_class(cast(Any, _dense_class(model)))
    if not is_root:
        model.moe_config = config


def _dense_class(thing: Any) -> type:
    """transformers' class of a model or a config, dense or sparse."""
    return next(kind for kind in type(thing).__mro__ if kind.__module__.startswith("transformers."))


class _SparseModel:
    """A model of transformers with sparse layers, as its config's ``moe_cfg`` says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        saved = with_towers(MoEConfig.from_dict(config.moe_cfg), self)  # type: ignore[arg-type]
        blocks = hugging_face_blocks(self)  # type: ignore[arg-type]
        towers = tuple(tower for tower in saved.towers if tower in blocks)  # another head may use one tower of two
        make_sparse(self, saved.replace(towers=towers))  # type: ignore[arg-type]
        adopt(self, saved.replace(towers=towers))

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: to custom code transformers does not apply a family's rules for attention, MLPs and heads."""
        return False

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        """transformers calls this for every module once it has read a file, for the model itself last. The tensors of
        sparse layers that the file lacks become those of a model that is made of the config: there, the family's rule
        for an MLP holds for all experts."""
        super()._initialize_weights(module, *args)  # type: ignore[misc]
        if module is not self:
            return
        parts = [part for part in self.modules() if not getattr(part, "holds_values", True)]  # type: ignore[attr-defined]
        tensors = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
        missing = {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()  # type: ignore[attr-defined]
            if id(tensor) in tensors and not getattr(tensor, "_is_hf_initialized", False)
        }
        made = type(self)(self.config).state_dict() if missing else {}  # type: ignore[attr-defined]
        for name, tensor in missing.items():
            tensor.copy_(made[name])
        for part in parts:
            part.holds_values = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's forward. A loss with gradients that it returns includes the weighted losses of the sparse
        layers (``clipup.aux_loss``), which exist in training mode only. If it returns no loss, they are left to the
        caller."""
        as_dict = kwargs.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict  # type: ignore[attr-defined]
        outputs = super().forward(*args, return_dict=True, **kwargs)  # type: ignore[misc]
        loss = getattr(outputs, "loss", None)
        if loss is not None and torch.is_grad_enabled():
            outputs.loss = loss + _share(kwargs) * aux_loss(self).to(loss.device)  # type: ignore[arg-type]
        return outputs if as_dict else outputs.to_tuple()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The dense class's, with the configs that the layers have now (``ValueError`` where they differ)."""
        for module in reversed(list(self.modules())):  # type: ignore[attr-defined]
            if isinstance(module, _SparseModel):
                module.config.moe_cfg = saved_config(module).to_dict()  # type: ignore[attr-defined, arg-type]
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def _share(arguments: dict[str, Any]) -> Any:
    """The weight of a batch's losses among those of an accumulated step. ``Trainer`` passes the number of labels of all
    its batches, by which models divide their sums; otherwise it divides by the number of batches itself."""
    labels, count = arguments.get("labels"), arguments.get("num_items_in_batch")
    return 1 if labels is None or count is None else (labels != -100).sum() / count


@functools.cache
def sparse_model_class(dense: Any) -> Any:
    """The class of the models that are upcycled from a ``dense``."""

    def with_arguments(name: str) -> Any:
        own: Any = getattr(_SparseModel, name)

        @functools.wraps(getattr(dense, name))  # Trainer and others read the names of arguments
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return own(self, *args, **kwargs)

        return method

    content = {
        "__module__": __name__,
        "__doc__": f"transformers' {dense.__name__}, upcycled: MLPs of some blocks are sparse layers.",
        "config_class": sparse_config_class(dense.config_class),  # type: ignore[attr-defined]
        "__init__": with_arguments("__init__"),
        "forward": with_arguments("forward"),
    }
    _convert_alike(dense.__name__, sparse_name(dense))
    sparse = type(sparse_name(dense), (_SparseModel, dense), content)
    # transformers notes in the constructor what a class can record; an upcycled model is given its class after it
    dict.__setitem__(modeling_utils._CAN_RECORD_REGISTRY, str(sparse), dense._can_record_outputs)
    return sparse


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    dense: Any = getattr(transformers, name.removeprefix("Sparse"), None) if name.startswith("Sparse") else None
    if inspect.isclass(dense) and issubclass(dense, transformers.PreTrainedModel):
        return sparse_model_class(cast(Any, dense))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def register_models(config_class: Any) -> None:
    """Lets every Auto class of transformers that knows the dense model find the sparse model, and names of weights be
    converted alike. This imports the model's module, so it is done when such a config is read."""
    dense_config = config_class.__mro__[2]
    _convert_alike(dense_config.model_type, config_class.model_type)
    for name in dir(modeling_auto):
        auto: Any = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not inspect.isclass(auto) or mapping is None or dense_config not in mapping:
            continue
        dense: Any = mapping[dense_config]
        if not isinstance(dense, tuple):  # with several classes, the config names the one to use
            cast(Any, auto).register(config_class, sparse_model_class(dense), exist_ok=True)


def _convert_alike(dense: str, sparse: str) -> None:
    """transformers saves weights under the names of its older versions, by a table of model types and class names."""
    if (mapping := get_checkpoint_conversion_mapping(dense)) is not None:
        register_checkpoint_conversion_mapping(sparse, mapping, overwrite=True)
