"""``clipup upcycle``: makes a dense model sparse, checks that its outputs are unchanged, and saves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..data.formats import idle_options, name_of_format
from ..data.options import SourceOptions, StepOptions, TrainingDataOptions
from ..models import known_models
from ..moe.options import SparseOptions
from ..option_group import all_idle, option
from ..progress import progress
from .flags import parse
from .logs import FLAG_OF
from .outputs import empty_directory

if TYPE_CHECKING:
    from torch import nn

_UNCALIBRATED = {"without --calibrate-data": lambda group: group.calibrate_data is None}
TOLERANCE = 1e-4
"""Largest difference of float32 features of length 1 that is attributed to rounding."""


@dataclass(kw_only=True)
class Options(SparseOptions):
    """Makes a dense CLIP sparse: in some blocks, several copies of the MLP (experts) and a new router replace the MLP.

    The defaults are CLIP-UP's recipe. For other sizes, set --num-experts, --top-k, --towers or --blocks first.

    Example: clipup upcycle ViT-B-16 models/b16-moe --pretrained laion2b_s34b_b88k
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An open_clip model name, or a directory with a dense model."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the sparse model. It must be empty or not exist."""
    pretrained: str | None = None
    """Tag, file of weights, or directory of a model or a finished run, for an open_clip model name."""
    random_weights: bool = option(
        False,
        idle={
            "on a model that has its own weights": lambda group: known_models.has_weights(group.model, group.pretrained)
        },
    )
    """Upcycle an open_clip model with untrained, random weights."""
    seed: int = 0
    """Seed of the routers, of re-initialized hidden units, and of random weights."""
    calibrate_data: str | None = option(
        None,
        idle={
            "on experts that compute what the dense MLP does; set --reinit-ratio, or leave it out": lambda group: (
                group.moe_cfg.keeps_function
            )
        },
    )
    """CSV file or WebDataset shards of image-text pairs for calibration, which fits re-initialized experts
    (--reinit-ratio) to the outputs of the dense MLPs."""
    calibrate_steps: int = option(100, idle=_UNCALIBRATED)
    """Calibration steps, one batch each."""
    calibrate_batch_size: int = option(64, idle=_UNCALIBRATED)
    """Image-text pairs per calibration batch."""
    calibrate_lr: float = option(1e-3, idle=_UNCALIBRATED)
    """Adam's learning rate in calibration."""
    source: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)
    allow_pipe: bool = option(False, idle=_UNCALIBRATED)
    """Let pipe:COMMAND in calibrate_data run its command in a shell. Only for a calibrate_data that you trust."""

    def idle(self) -> dict[str, str]:
        return super().idle() | (
            all_idle(SourceOptions, "without --calibrate-data")
            if self.calibrate_data is None
            else idle_options(name_of_format(self.calibrate_data, self.source.dataset_type))
        )


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup upcycle")
    with empty_directory(options.out):
        run(options)
    return 0


def run(options: Options) -> None:
    """Upcycles the model, checks it, and saves it to the empty output directory."""
    import torch

    from ..clip import flops
    from ..models import architecture, factory, model_names, saving, tokenizers
    from ..upcycling.step0 import step0_difference
    from ..upcycling.upcycle import upcycle

    options.model, options.pretrained = factory.name_and_weights(options.model, options.pretrained)
    if not options.random_weights:
        model_names.refuse_random_weights(
            "pretrained", options.model, options.pretrained, "or --random-weights to upcycle random weights"
        )
    torch.manual_seed(options.seed)
    dense, _, preprocess = factory.create_model_and_transforms(options.model, options.pretrained)
    model_cfg = model_names.get_model_config(options.model)
    tokenizer_files = tokenizers.files_of(model_cfg["text_cfg"], tokenizers.source_directory(options.model))
    sparse = upcycle(dense, options.moe_cfg)
    if options.calibrate_data is not None:
        run_calibration(sparse, dense, options, preprocess)
    difference = step0_difference(dense, sparse)
    if options.moe_cfg.keeps_function and not difference <= TOLERANCE:
        raise ValueError(
            f"the sparse model's features differ from the dense model's by {difference:.1e}, more than rounding "
            f"({TOLERANCE:.0e}); nothing was saved"
        )
    base_model = model_names.base_model(options.model, options.pretrained)
    model_cfg = architecture.with_logit_bias(model_cfg, getattr(dense, "logit_bias", None))
    saving.save_with_tokenizer(sparse, options.out, model_cfg, tokenizer_files, base_model=base_model)
    dense_counts, sparse_counts = flops.count(dense), flops.count(sparse)
    print(f"largest difference of normalized features at step 0: {difference:.1e}")
    print(
        f"parameters: {dense_counts.params / 1e6:.1f} M dense, {sparse_counts.params / 1e6:.1f} M sparse, "
        f"{sparse_counts.active_params / 1e6:.1f} M active per token"
    )
    print(f"saved to {options.out}{' (random weights)' * options.random_weights}")


def run_calibration(sparse: nn.Module, dense: nn.Module, options: Options, preprocess: Callable[..., Any]) -> None:
    """Calibrates the sparse model and prints the error of each layer before and after."""
    from ..clip.inputs import CheckedTokenizer
    from ..data.loaders import load_train_data
    from ..models import tokenizers
    from ..upcycling.calibration import calibrate

    assert options.calibrate_data is not None
    FLAG_OF.update(train_data="--calibrate-data", batch_size="--calibrate-batch-size")
    step = StepOptions(batch_size=options.calibrate_batch_size, seed=options.seed)
    data = TrainingDataOptions(
        **asdict(options.source),
        train_data=options.calibrate_data,
        workers=1,
        train_num_samples=options.calibrate_steps * options.calibrate_batch_size,
        allow_pipe=options.allow_pipe,
    )
    tokenizer = CheckedTokenizer(tokenizers.get_tokenizer(options.model), dense).check()
    loader = load_train_data(data, step, preprocess, tokenizer)
    steps = progress(loader.dataloader, "calibrating", "steps", total=options.calibrate_steps)
    errors = calibrate(sparse, dense, steps, lr=options.calibrate_lr)
    for name, values in errors.items():
        print(f"{name}: relative squared error {values[0]:.1e} before, {values[-1]:.1e} in the last batch")
