"""``clipup upcycle``: makes a dense model sparse, checks that it computes the same, and saves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from .. import atomic_files
from ..clip import flops
from ..data.loaders import load_train_data
from ..data.options import DataOptions
from ..data.train_data import TrainData
from ..locks import LOCK_FILE, exclusive
from ..moe.config import MoEConfig
from ..pretrained import factory, model_names, origin, saving, tokenizers
from ..progress import progress
from ..upcycling.calibration import calibrate
from ..upcycling.step0 import step0_difference
from ..upcycling.upcycle import upcycle
from .flags import NoEffect, is_csv, moe_rules, parse
from .outputs import check_directory

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
    """Tag or file of open_clip weights for a model known by name."""
    random_weights: bool = False
    """Upcycle a model known by name with random weights, which nothing has trained."""
    seed: int = 0
    """Seed of the fresh routers, of hidden units drawn anew, and of random weights."""
    calibrate_data: str | None = None
    """CSV file or WebDataset shards of image-text pairs to fit experts to the dense MLPs' outputs on, for experts that
    do not start as copies (--reinit-ratio)."""
    calibrate_steps: int = 100
    """Steps of that fit, a batch each."""
    calibrate_batch_size: int = 64
    """Pairs in a batch of it."""
    calibrate_lr: float = 1e-3
    """Adam's step size in it."""
    allow_pipe: bool = DataOptions.allow_pipe
    """Let pipe:COMMAND in calibrate_data run its command in a shell. Only for a calibrate_data that you trust."""
    moe: Annotated[MoEConfig, tyro.conf.arg(name="")] = field(default_factory=MoEConfig.clip_up)


RULES = [
    NoEffect(
        ("calibrate_steps", "calibrate_batch_size", "calibrate_lr", "allow_pipe"),
        lambda options: options.calibrate_data is None,
        "without --calibrate-data",
    ),
    NoEffect(
        ("random_weights",),
        lambda options: origin.brings_weights(options.model, options.pretrained),
        "on a model that brings its weights",
    ),
    *moe_rules(lambda options: options.moe),
]


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup upcycle", RULES)
    if options.out.exists() and not options.out.is_dir():
        raise FileExistsError(f"{options.out} is a file; choose another directory")
    check_directory("out", options.out)
    otherwise = "wait for it to end, or choose another directory"
    with exclusive(options.out / LOCK_FILE, options.out, otherwise):
        atomic_files.remove_abandoned(options.out, locked=True)
        if {path.name for path in options.out.iterdir()} - {LOCK_FILE}:
            raise FileExistsError(f"{options.out} exists already and holds something; choose another directory")
        run(options)
    return 0


def run(options: Options) -> None:
    """Upcycles, checks and saves into the directory, which is empty."""
    if options.calibrate_data is not None and options.moe.keeps_function:
        raise ValueError(
            f"calibrate_data={options.calibrate_data!r} fits experts that differ from the dense MLP, and these are its "
            "copies; set reinit_ratio, or leave calibrate_data out"
        )
    if not options.random_weights:
        origin.refuse_random_weights(
            "pretrained", options.model, options.pretrained, "or --random-weights, to upcycle them all the same"
        )
    model_cfg = model_names.get_model_config(options.model)
    torch.manual_seed(options.seed)
    dense, _, preprocess = factory.create_model_and_transforms(options.model, options.pretrained)
    sparse = upcycle(dense, options.moe)
    if options.calibrate_data is not None:
        fit(sparse, dense, options, preprocess)
    difference = check_step0(step0_difference(dense, sparse), options.moe)
    base_model = origin.base_model(options.model, options.pretrained)
    saving.save_pretrained(sparse, options.out, model_cfg, base_model=base_model)
    before, after = flops.count(dense), flops.count(sparse)
    print(f"largest difference of a normalised feature at step 0: {difference:.1e}")
    print(
        f"parameters: {before.params / 1e6:.1f} M dense, {after.params / 1e6:.1f} M sparse, of which "
        f"{after.active_params / 1e6:.1f} M are active for a token"
    )
    random = ", of random weights" if options.random_weights else ""
    print(f"saved to {options.out}{random}")


def fit(sparse: nn.Module, dense: nn.Module, options: Options, preprocess: Callable[..., Any]) -> None:
    """Calibrates the sparse model and prints how far its layers were and are from the dense ones."""
    data = DataOptions(
        train_data=options.calibrate_data,
        batch_size=options.calibrate_batch_size,
        seed=options.seed,
        train_num_samples=_samples(options),
        allow_pipe=options.allow_pipe,
    )
    loader = load_train_data(data, preprocess, tokenizers.get_tokenizer(options.model))
    batches = islice(_batches(loader), options.calibrate_steps)
    steps = progress(batches, "calibrating", "steps", total=options.calibrate_steps)
    errors = calibrate(sparse, dense, steps, lr=options.calibrate_lr)
    for name, values in errors.items():
        print(f"{name}: squared error {values[0]:.1e} of the MLP's output before, {values[-1]:.1e} in the last batch")


def _samples(options: Options) -> int | None:
    """What shards without a sizes.json do not say: as many samples an epoch as there are to be."""
    return None if is_csv(options.calibrate_data) else options.calibrate_steps * options.calibrate_batch_size


def _batches(loader: TrainData) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch; ends when an epoch gives nothing."""
    for epoch in count(1):
        loader.set_epoch(epoch)
        got = 0
        for batch in loader.dataloader:
            got += 1
            yield batch
        if not got:
            return


def check_step0(difference: float, config: MoEConfig) -> float:
    """Returns the difference, or refuses it where the config promises that the two models compute the same."""
    if config.keeps_function and not difference <= TOLERANCE:
        raise ValueError(
            f"the sparse model's features differ from the dense model's by {difference:.1e}, more than rounding "
            f"({TOLERANCE:.0e}); nothing was saved"
        )
    return difference
