"""The parameters of a tower by depth, from the input to the head: what locking and layer-wise learning rates count."""

from __future__ import annotations

from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

from .towers import is_timm, tower_blocks, tower_module

Group = dict[str, nn.Parameter]
"""Parameters by full name."""

_HEADS = ("proj", "text_projection", "attn_pool", "pooler")
_DECODER = "text_decoder."


def tower_parameters(model: nn.Module, tower: str) -> Group:
    """All parameters of the "image" or the "text" tower, by full name.

    In open_clip's CLIP the text tower is not a module. Its parameters are those of the model without the image tower's
    and without the scale and bias of the logits.
    """
    path, module = tower_module(model, tower)
    if path:
        return {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
    others = ("visual.", "logit_", _DECODER) if tower == "text" else ("logit_",)
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(others)}


def layer_groups(model: nn.Module, tower: str) -> list[Group]:
    """The parameters of a tower in groups, as open_clip 4 forms them: the embeddings, each block, the head.

    The norm after the last block belongs to that block's group. The head is the projection, with an attention pool or a
    Hugging Face pooler; a tower without a projection has no such group. A timm trunk has the groups of its own
    ``group_matcher``, on which timm's layer decay is built. Experts and routers of a sparse block belong to the block's
    group. A tower without a list of blocks (ModifiedResNet) is one group.

    Args:
        tower: "image" or "text".
    """
    path, module = tower_module(model, tower)
    parameters = tower_parameters(model, tower)
    if isinstance(module, TimmModel) or is_timm(module):
        return _timm_groups(path, module, parameters)
    try:
        blocks = list(tower_blocks(model, tower))
    except TypeError:
        return [parameters]
    groups: list[Group] = [{} for _ in range(len(blocks) + 2)]
    last = 0
    for name, parameter in parameters.items():
        block = next((index for index, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if block is not None:
            last = block + 1
            groups[last][name] = parameter
        elif _is_head(name.removeprefix(f"{path}.")):
            groups[-1][name] = parameter
        else:
            # A final norm is defined after the blocks. A CLIP registers its embeddings after its text transformer, so
            # there the names decide.
            is_norm = name.removeprefix(f"{path}.").split(".")[0].startswith("ln_")
            after = last > 0 and (is_norm or isinstance(module, HFTextEncoder))
            groups[len(blocks) if after else 0][name] = parameter
    return [group for group in groups if group]


def _is_head(name: str) -> bool:
    """name: within the tower."""
    parts = name.split(".")
    return parts[0] in _HEADS or parts[:2] == ["transformer", "pooler"]


def _timm_groups(path: str, module: nn.Module, parameters: Group) -> list[Group]:
    trunk: Any = module.trunk if isinstance(module, TimmModel) else module
    prefix = f"{path}.trunk." if isinstance(module, TimmModel) else ""
    by_depth = group_parameters(trunk, trunk.group_matcher())
    groups = [
        {f"{prefix}{name}": parameters[f"{prefix}{name}"] for name in by_depth[depth]} for depth in sorted(by_depth)
    ]
    rest = set(parameters).difference(*groups)
    head = {name: parameter for name, parameter in parameters.items() if name in rest}
    return [*groups, *([head] if head else [])]
