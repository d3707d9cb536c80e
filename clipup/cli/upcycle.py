"""``clipup upcycle``: makes a dense model sparse, checks that it computes the same, and saves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .. import checkpoint, flops, models
from ..config import MoEConfig
from ..upcycle import step0_difference, upcycle

TOLERANCE = 1e-4
"""Largest difference between float32 features of length 1 that rounding explains."""


@dataclass
class Options:
    """Makes a dense CLIP sparse: the MLP of some blocks becomes several experts, copies of it, behind a fresh router.

    Example: clipup upcycle ViT-B-16 models/b16-moe --pretrained laion2b_s34b_b88k
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model that open_clip knows, or a directory with a dense model."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the sparse model; must not exist, or be empty."""
    pretrained: str | None = None
    """Tag or file of open_clip weights for a model known by name. None: random weights."""
    seed: int = 0
    """Seed of the fresh routers, and of random weights."""
    moe: Annotated[MoEConfig, tyro.conf.arg(name="")] = field(default_factory=MoEConfig.clip_up)


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, args=argv, prog="clipup upcycle")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise FileExistsError(f"{options.out} exists already and holds something; choose another directory")
    model_cfg = models.get_model_config(options.model)
    torch.manual_seed(options.seed)
    dense, *_ = models.create_model_and_transforms(options.model, options.pretrained)
    sparse = upcycle(dense, options.moe)
    difference = check_step0(step0_difference(dense, sparse), options.moe)
    checkpoint.save_pretrained(sparse, options.out, model_cfg)
    before, after = flops.count(dense), flops.count(sparse)
    print(f"largest difference of a normalised feature at step 0: {difference:.1e}")
    print(
        f"parameters: {before.params / 1e6:.1f} M dense, {after.params / 1e6:.1f} M sparse, of which "
        f"{after.active_params / 1e6:.1f} M are active for a token"
    )
    print(f"saved to {options.out}")
    return 0


def check_step0(difference: float, config: MoEConfig) -> float:
    """Returns the difference, or refuses it where the two models must compute the same: with normalised gates."""
    if config.normalize_gates != "none" and not difference <= TOLERANCE:
        raise ValueError(
            f"the sparse model's features differ from the dense model's by {difference:.1e}, more than rounding "
            f"({TOLERANCE:.0e}); nothing was saved"
        )
    return difference
