"""Options of the model that a run starts from, of its input, and of how it computes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from ..option_group import KeyValues, OptionGroup, Resumed, option

_UNCOMPILED = {"without --torchcompile": lambda group: not group.torchcompile}


@dataclass(kw_only=True)
class ModelOptions(OptionGroup):
    """The model, its weights, and whether it is made sparse."""

    model: str | None = option(None, Resumed.IDENTITY)
    """A model that open_clip knows, or a directory that clipup saved (dense or sparse)."""
    pretrained: str | None = option(None, Resumed.IDENTITY)
    """Tag or file of open_clip weights for a model known by name, or a directory with weights. None: random weights."""
    moe: bool = option(False, Resumed.IDENTITY)
    """Make the model sparse before training, with the options of MoEConfig below."""
    resume_dense: str | None = option(None, Resumed.START)
    """Checkpoint of a dense run (epoch_K.pt, ours or open_clip_train 3's) to start --moe from: its weights, and Adam's
    moments for every expert. Steps and schedule start at zero."""

    force_image_size: int | tuple[int, int] | None = option(None, Resumed.IDENTITY)
    """Side of the images instead of the model's, or height and width. Position embeddings are resized."""
    force_patch_dropout: float | None = option(None, Resumed.FREE)
    """Share of the patches that the image tower leaves out in training, instead of the model's."""
    force_context_length: int | None = option(None, Resumed.IDENTITY)
    """Tokens of a text instead of the model's. Position embeddings are resized."""
    force_quick_gelu: bool = option(False, Resumed.IDENTITY)
    """Use QuickGELU, as OpenAI's weights need."""
    force_custom_text: bool = option(False, Resumed.IDENTITY)
    """Give the text tower a module of its own (CustomTextCLIP)."""

    def model_overrides(self) -> dict[str, Any]:
        """The arguments of open_clip's factory that differ from its defaults."""
        values = {
            each.name: getattr(self, each.name) for each in fields(ModelOptions) if each.name.startswith("force_")
        }
        return {name: value for name, value in values.items() if value is not None and value is not False}


@dataclass(kw_only=True)
class ImageTransformOptions(OptionGroup):
    """How images become the model's input; None keeps what belongs to the weights."""

    aug_cfg: KeyValues = option(factory=dict, resumed=Resumed.FREE)
    """Augmentations in training, KEY=VALUE: fields of open_clip's AugmentationCfg, such as scale="(0.4, 1.0)"
    color_jitter=0.4 use_timm=True."""
    image_mean: tuple[float] | tuple[float, float, float] | None = option(None, Resumed.MEASURED)
    """Mean of the channels that is subtracted, one value or three."""
    image_std: tuple[float] | tuple[float, float, float] | None = option(None, Resumed.MEASURED)
    """Standard deviation of the channels that is divided by, one value or three."""
    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = option(None, Resumed.MEASURED)
    """How images are resized. In training it needs aug_cfg use_timm=True; otherwise training images are resized
    bicubically."""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = option(None, Resumed.MEASURED)
    """How images get the model's shape in evaluation: crop what exceeds it, pad what is short of it, or distort."""

    def transform_arguments(self) -> dict[str, Any]:
        """The arguments of open_clip's factory about transforms that differ from its defaults."""
        values = {each.name: getattr(self, each.name) for each in fields(ImageTransformOptions)}
        given = {name: value for name, value in values.items() if value not in (None, {})}
        return {name: value * (3 // len(value)) if isinstance(value, tuple) else value for name, value in given.items()}


@dataclass(kw_only=True)
class SpeedOptions(OptionGroup):
    """Precision, memory and speed of a step."""

    precision: Literal["fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16"] | None = option(None, Resumed.MEASURED)
    """fp32, amp (float16 autocast), amp_bf16 or amp_bfloat16 (bfloat16 autocast) or bf16 (the model itself). None: amp
    on CUDA, amp_bf16 there with fsdp or ep; else fp32."""
    grad_checkpointing: bool = option(False, Resumed.FREE)
    """Recompute activations in the backward pass instead of keeping them."""
    torchcompile: bool = option(False, Resumed.FREE)
    """Compile the model's forward and backward pass with torch.compile, sparse layers included. The first step takes
    much longer."""
    torchcompile_backend: str | None = option(None, Resumed.FREE, idle=_UNCOMPILED)
    """Backend of torch.compile. None: inductor."""
    torchcompile_mode: str | None = option(
        None,
        Resumed.FREE,
        idle=_UNCOMPILED
        | {"without the backend inductor": lambda group: group.torchcompile_backend not in (None, "inductor")},
    )
    """Mode of the backend inductor: default, reduce-overhead, max-autotune."""
    device: str = option("auto", Resumed.FREE)
    """cpu, cuda or cuda:N. auto: cuda if torch finds a GPU, else cpu."""

    def check(self) -> None:
        super().check()
        if self.precision == "amp_bfloat16":  # open_clip's second name
            self.precision = "amp_bf16"
