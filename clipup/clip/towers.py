"""Finds the towers of a model and their transformer blocks, for open_clip's CLIP and CoCa, timm and transformers."""

from __future__ import annotations

import open_clip
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import MultimodalTransformer, TextTransformer, VisionTransformer
from timm.models._features import FeatureGetterNet
from torch import nn

from ..moe.config import DEFAULT_TOWERS, MoEConfig
from .hugging_face import hugging_face_blocks, is_hugging_face

_CLIPS = (open_clip.CLIP, open_clip.CustomTextCLIP, CoCa)
_LISTS: tuple[str, ...] = ("resblocks", "blocks", "stages", "layers")
_HUGGING_FACE_LISTS: tuple[str, ...] = ("encoder.layer", "block", "layers")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, DataParallel, AveragedModel or what ``torch.compile`` returns."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def towers(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's towers: "image" and "text" of a CLIP, also "decoder" of a CoCa; "image" of a timm model;
    those of a transformers model.

    Raises:
        TypeError: none of these, or a transformers model of an unknown family.
    """
    if isinstance(model, CoCa):
        return ("image", "text", "decoder")
    if isinstance(model, _CLIPS):
        return ("image", "text")
    if isinstance(model, FeatureGetterNet):
        raise TypeError(
            "model is timm's features_only wrapper; upcycle the model in it: upcycle(net.model, inplace=True)"
        )
    if is_timm(model):
        return ("image",)
    if is_hugging_face(model):
        return tuple(hugging_face_blocks(model))
    unwrap = "" if model is unwrapped(model) else ", without a wrapper"
    raise TypeError(
        f"expected open_clip's CLIP, CustomTextCLIP or CoCa, or a model of timm or transformers{unwrap}, got "
        f"{type(model).__name__}"
    )


def with_towers(config: MoEConfig, model: nn.Module) -> MoEConfig:
    """The config with the towers that become sparse: those that it names, else the model's image and text towers."""
    if config.towers is not None:
        return config
    available = towers(model)
    return config.replace(towers=tuple(tower for tower in DEFAULT_TOWERS if tower in available))


def is_timm(model: nn.Module) -> bool:
    """Whether a model is a plain timm model, not part of an open_clip model."""
    return type(model).__module__.startswith("timm.models.")


def tower_blocks(model: nn.Module, tower: str) -> dict[str, nn.Module]:
    """The blocks of a tower ("image", "text" or "decoder") by full name, in execution order.

    A decoder layer is two blocks, the second with cross-attention.

    Raises:
        TypeError: not a CLIP, CoCa or timm model, no such tower, or the tower has no list of blocks.
    """
    if tower not in towers(model):
        raise TypeError(f"a {type(model).__name__} has no {tower} tower; choose from towers={towers(model)}")
    if is_hugging_face(model):
        return hugging_face_blocks(model)[tower]
    path, module = tower_module(model, tower)
    names = _HUGGING_FACE_LISTS if isinstance(module, HFTextEncoder) else _LISTS
    if isinstance(module, TimmModel):
        path, module = f"{path}.trunk", module.trunk
    elif isinstance(module, HFTextEncoder | VisionTransformer | TextTransformer | open_clip.CLIP):
        path, module = f"{path}.transformer", module.transformer
    for name in names:
        blocks = _blocks(module, name)
        if blocks:
            return {f"{path}.{name}".lstrip("."): block for name, block in blocks.items()}
    raise TypeError(
        f"the {tower} tower ({path}: {type(module).__name__}) has no list of transformer blocks"
        f"{leave_dense(model, tower)}"
    )


def tower_module(model: nn.Module, tower: str) -> tuple[str, nn.Module]:
    """A tower's full name and module. If the model itself is the tower: an empty name and the model."""
    if is_timm(model):
        return "", model
    name = {"image": "visual", "text": "text", "decoder": "text_decoder"}[tower]
    return (name, getattr(model, name)) if hasattr(model, name) else ("", model)


def leave_dense(model: nn.Module, tower: str) -> str:
    """Advice at the end of an error message: the option that leaves a tower dense, if the model has another tower."""
    other = "text" if tower == "image" else "image"
    ways = f'; towers=("{other}",), or --towers {other} of a command, leave the {tower} tower dense'
    return ways if other in towers(model) else ""


def _blocks(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The blocks in the list ``name`` of a module, by name. If it is a list of stages, the blocks of each stage."""
    listed = dict(module.named_modules()).get(name)
    if not isinstance(listed, nn.ModuleList | nn.Sequential):
        return {}
    blocks: dict[str, nn.Module] = {}
    for index, item in listed.named_children():
        stage = getattr(item, "blocks", None)
        if isinstance(stage, nn.ModuleList | nn.Sequential):
            blocks |= {f"{name}.{index}.blocks.{i}": block for i, block in stage.named_children()}
        else:
            blocks[f"{name}.{index}"] = item
        if isinstance(module, MultimodalTransformer):
            blocks[f"cross_attn.{index}"] = module.cross_attn.get_submodule(index)
    return blocks
