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
    # Without a text module: the model's parameters minus those of the other towers.
    others = ("visual.", "logit_", _DECODER) if tower == "text" else ("logit_",)
    named = module.named_parameters(path)
    parameters = {name: parameter for name, parameter in named if path or not name.startswith(others)}
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
        parts = name.removeprefix(f"{path}.").split(".")
        if block is not None:
            last = block + 1
            groups[last][name] = parameter
        elif parts[0] in _HEADS or parts[:2] == ["transformer", "pooler"]:
            groups[-1][name] = parameter
        else:
            # A final norm is defined after the blocks. A CLIP registers its embeddings after its text transformer, so
            # there the names decide.
            after = last > 0 and (parts[0].startswith("ln_") or isinstance(module, HFTextEncoder))
            groups[len(blocks) if after else 0][name] = parameter
    return [group for group in groups if group]


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
