"""``upcycle``: turns a dense CLIP into a sparse CLIP that computes the same function (CLIP-UP, arXiv 2502.00965).

In some blocks, E copies of the MLP behind a new router replace the MLP. With normalized gates and no dropped tokens,
the sparse model has the same outputs as the dense model. ``step0_difference`` measures this, and
``MoEConfig.keeps_function`` tells for which options it holds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from .. import checks
from ..clip.hugging_face import is_hugging_face
from ..clip.towers import with_towers
from ..moe.config import MoEConfig, check_config
from ..moe.layer import moe_layers
from .sparse_blocks import chosen_mlps, make_sparse

M = TypeVar("M", bound=nn.Module)


def upcycle(model: M | Sequence[M], config: MoEConfig | None = None, inplace: bool = False) -> M:
    """Turns a dense model into a sparse model.

    Devices, dtypes, requires_grad and training modes are kept; meta tensors work. The result has the config as
    ``model.moe_config``, which names its sparse towers. Its ``no_weight_decay()``, which timm's optimizers call, adds
    the biases and norms of the experts to those of the dense model. If an error is raised, the model is unchanged.

    Args:
        model: open_clip's CLIP, CustomTextCLIP or CoCa, a timm model, or a model of transformers
            (``clipup.clip.hugging_face``), dense and not wrapped. Or several models of one architecture, such as
            checkpoints of one training that were fine-tuned differently: expert e, or group e of
            ``config.granularity`` experts, is the MLP of model e modulo their number (the multiplet of CLIP-MoE, arXiv
            2409.19291), everything else is the first model's. Then the result differs from all of them at step 0.
        config: which blocks become sparse, and how. None means ``MoEConfig.clip_up()``.
        inplace: modify ``model`` instead of a copy.

    Raises:
        TypeError: an unsupported model or argument, a named tower that the model lacks, or a selected block whose MLP
            is not of a supported family.
        ValueError: no model, or models that differ in the shape of an MLP; a model is already sparse, ``config.blocks``
            names a missing block, or a hidden width is not a multiple of ``config.granularity``.
        ImportError: a model of transformers before version 5.
    """
    models: list[M] = list(model) if isinstance(model, list | tuple) else [model]  # type: ignore[list-item]
    if not models:
        raise ValueError("model is an empty list; expected one dense model, or several")
    for dense in models:
        checks.plain_weights("model", dense)
    first = models[0]
    if config is None:
        config = MoEConfig.clip_up()
    check_config("config", config)
    if sparse := [name for model in models for name in moe_layers(model)]:
        raise ValueError(f"the model is already sparse ({sparse[0]} and {len(sparse) - 1} more); upcycle a dense model")
    if len(models) > (groups := config.num_experts // config.granularity):
        raise ValueError(f"model is a list of {len(models)}, but config has experts for {groups} of them")
    config = with_towers(config, first)
    # raises before anything is copied
    mlps, *more = ([mlp.dense for mlp in chosen_mlps(dense, config)] for dense in models)
    for number, counterparts in enumerate(zip(mlps, *more, strict=True)):
        forms = {
            (mlp.activation, *((name, value.shape) for name, value in mlp.parameters().items())) for mlp in counterparts
        }
        if len(forms) > 1:
            raise ValueError(f"models must be of one architecture; their MLPs {number} are {forms}")
    if is_hugging_face(first):
        from .sparse_hugging_face import adopt, check_classes  # imports transformers, which is optional

        check_classes(first)
    if not inplace:
        first = copy.deepcopy(first)
    make_sparse(first, config, more)
    if is_hugging_face(first):
        adopt(first, config)
    return first
