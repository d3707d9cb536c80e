"""Options of the model that a run starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...checks import check
from .group import OptionGroup


@dataclass(kw_only=True)
class ModelOptions(OptionGroup):
    """The model, its weights, and whether it is made sparse."""

    model: str | None = None
    """A model that open_clip knows, or a directory that clipup saved (dense or sparse)."""
    pretrained: str | None = None
    """Tag or file of open_clip weights for a model known by name, or a directory with weights. None: random weights."""
    moe: bool = False
    """Make the model sparse before training, with the options of MoEConfig below."""
    resume_dense: str | None = None
    """Checkpoint of a dense run (epoch_K.pt, ours or open_clip_train's) to start --moe from: its weights, and Adam's
    moments for every expert. Steps and schedule start at zero."""

    force_image_size: int | tuple[int, int] | None = None
    """Side of the images in place of the model's, or height and width. Position embeddings are resized."""
    force_patch_dropout: float | None = None
    """Share of the patches that the image tower leaves out in training, in place of the model's."""
    force_context_length: int | None = None
    """Tokens of a text in place of the model's. Position embeddings are resized."""
    force_quick_gelu: bool = False
    """Use QuickGELU, as OpenAI's weights need."""
    force_custom_text: bool = False
    """Give the text tower a module of its own (CustomTextCLIP)."""

    def check(self) -> None:
        if self.resume_dense is not None and not self.moe:
            raise ValueError(
                f"resume_dense={self.resume_dense!r} starts a sparse model, which needs moe; set moe, or continue the "
                "dense run with resume"
            )
        if self.resume_dense is not None and self.pretrained is not None:
            raise ValueError(
                f"resume_dense={self.resume_dense!r} and pretrained={self.pretrained!r} both select weights; use one"
            )
        size, length = self.force_image_size, self.force_context_length
        sides = size if isinstance(size, tuple) else (size,)
        check("force_image_size", size, all(side is None or side >= 1 for side in sides), "positive")
        check("force_context_length", length, length is None or length >= 1, "positive")
        dropout = self.force_patch_dropout
        check("force_patch_dropout", dropout, dropout is None or 0 <= dropout < 1, "in [0, 1)")

    def model_overrides(self) -> dict[str, Any]:
        """The arguments of open_clip's factory that differ from its defaults."""
        names = (field.name for field in dataclasses.fields(ModelOptions) if field.name.startswith("force_"))
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}
