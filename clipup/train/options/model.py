"""Options of the model that a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

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
