"""From options to what a run is made of: the model, the data, the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.coca_model import CoCa
from torch import nn

from ..clip import inputs
from ..data.loaders import load_eval_samples, load_train_data
from ..data.shares import Share
from ..data.train_data import TrainData
from ..evaluate.retrieval import evaluate_retrieval
from ..moe.config import MoEConfig
from ..precision import Precision
from ..pretrained import factory, model_names, origin, tokenizers
from ..upcycling.upcycle import upcycle
from . import checkpoints
from .distributed import Ranks
from .objectives import SIGLIP_INIT
from .optimizer_upcycling import OptimizerState, named_state, upcycled_state
from .options import TrainOptions
from .step import Batch, drops_by_position


class Built(NamedTuple):
    """A model and what belongs to it; ``None`` for what the caller did not give and nothing needs."""

    model: nn.Module
    preprocess_train: Callable[[Any], torch.Tensor] | None
    preprocess_val: Callable[[Any], torch.Tensor] | None
    tokenizer: Callable[[list[str]], torch.Tensor] | None
    model_cfg: dict[str, Any] | None
    """open_clip's architecture config; None when the model was passed in and ``options.model`` does not name it."""
    optimizer_state: OptimizerState | None = None
    """What the optimizer starts with, carried over from ``options.resume_dense``."""


def check_complete(options: TrainOptions, model: nn.Module | None, loader: Any) -> None:
    """Before anything is built, whether there is a model and data to train it on.

    Raises:
        ValueError: one is missing, or ``moe_cfg`` is meant for a model that is not made sparse.
    """
    from_directory = options.pretrained is not None and Path(options.pretrained).is_dir()
    if model is None and options.model is None and not from_directory:
        raise ValueError(
            "model is missing: pass a name that open_clip knows, such as --model ViT-B-16, or a directory with a saved "
            "model"
        )
    if loader is None and options.train_data is None:
        raise ValueError(
            "train_data is missing: pass --train-data with a CSV file or WebDataset shards (in Python also a loader)"
        )
    if not options.moe and options.moe_cfg != MoEConfig.clip_up():
        raise ValueError("moe_cfg has no effect without moe=True, which makes the model sparse; set it too")


def build_model(
    options: TrainOptions,
    device: torch.device,
    precision: Precision,
    model: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
) -> Built:
    """The model on its device, made sparse when ``options.moe`` says so.

    Args:
        model: one that is built already; ``options.model`` then only names its architecture, for saving.
        preprocess: the transform of training and validation images, or a pair of them.
    """
    train_transform, val_transform = preprocess if isinstance(preprocess, tuple) else (preprocess, preprocess)
    if model is None:
        model, model_cfg, transforms, tokenizer = _create(options, device, precision, tokenizer)
        train_transform, val_transform = train_transform or transforms[0], val_transform or transforms[1]
    else:
        model = model.to(device)
        model_cfg = None if options.model is None else model_names.get_model_config(options.model)
    optimizer_state = None
    if options.resume_dense is not None:
        optimizer_state = _resume_dense(model, options.resume_dense, options)
    if options.moe:
        model = upcycle(model, options.moe_cfg, inplace=True)
    if isinstance(model, CoCa) and drops_by_position(model):
        raise ValueError(
            "a CoCa's decoder reads the image and the text of a pair together, so its texts cannot be shuffled against "
            "the images, as training has to where an expert's slots go by position; give them by probability (with "
            "--moe: --priority) or set no capacity factor (--capacity-factor None)"
        )
    if options.siglip and getattr(model, "logit_bias", None) is None:
        raise ValueError(
            "siglip needs a model with a logit_bias, which this one lacks; train a fresh one by name, or create it "
            f"with {', '.join(f'{key}={value:.4g}' for key, value in SIGLIP_INIT.items())}"
        )
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return Built(model, train_transform, val_transform, tokenizer, model_cfg, optimizer_state)


def build_teacher(
    options: TrainOptions, student: nn.Module, device: torch.device, precision: Precision
) -> nn.Module | None:
    """The model that ``options.distill_model`` names, in evaluation and frozen.

    Raises:
        ValueError: it would have random weights, or takes other images or texts than the student.
    """
    name, pretrained = options.distill_model, options.distill_pretrained
    if name is None:
        return None
    origin.refuse_random_weights("distill_pretrained", name, pretrained)
    teacher, *_ = factory.create_model_and_transforms(
        name, pretrained, precision=precision, device=device, output_dict=True
    )
    alike = {
        "image size": inputs.image_size,
        "normalization of images": inputs.image_normalization,
        "text length": inputs.text_length,
        "vocabulary size": inputs.vocabulary_size,
    }
    for what, of in alike.items():
        theirs, ours = of(teacher), of(student)
        if theirs != ours and None not in (theirs, ours):
            raise ValueError(
                f"distill_model={name!r} has {what} {theirs}, the model that it teaches {ours}: both get the same "
                "batch; choose a teacher of the same"
            )
    return teacher.eval().requires_grad_(False)


def _resume_dense(model: nn.Module, path: str, options: TrainOptions) -> OptimizerState:
    """Puts a dense run's weights into the model; the optimizer's state, as the sparse model needs it."""
    state = checkpoints.load(path)
    checkpoints.restore(model, state["state_dict"], path)
    return upcycled_state(model, options.moe_cfg, named_state(model, state["optimizer"], path))


def _create(options: TrainOptions, device: torch.device, precision: Precision, tokenizer: Any) -> tuple[Any, ...]:
    name, pretrained = options.model, options.pretrained
    if pretrained is not None and Path(pretrained).is_dir():
        if name is not None and model_names.get_model_config(name) != model_names.get_model_config(pretrained):
            raise ValueError(
                f"model is {name!r}, but the directory pretrained={pretrained!r} holds another architecture; leave "
                "model out"
            )
        name, pretrained = pretrained, None
    model_cfg = model_names.get_model_config(name)
    fresh = pretrained is None and model_names.directory_of(name) is None
    init = SIGLIP_INIT if options.siglip and fresh else {}
    model, *transforms = factory.create_model_and_transforms(
        name, pretrained, precision=precision, device=device, output_dict=True, **init
    )
    return model, {**model_cfg, **init}, transforms, tokenizer or tokenizers.get_tokenizer(name)


class Epochs:
    """Training data as steps: lists of ``accum_freq`` batches of (images [B, 3, H, W], texts [B, context_length])."""

    def __init__(self, loader: Any, accum_freq: int) -> None:
        """
        Args:
            loader: ``TrainData``, or anything with a length that can be iterated again and again.

        Raises:
            ValueError: fewer than ``accum_freq`` batches an epoch.
        """
        self._info = loader
        self._batches = getattr(loader, "dataloader", loader)
        self._accum_freq = accum_freq
        count = getattr(self._batches, "num_batches", None)
        count = len(self._batches) if count is None else count
        self.steps = count // accum_freq
        if self.steps == 0:
            raise ValueError(
                f"the training data gives {count} batches an epoch, too few for a step of {accum_freq}; lower "
                "batch_size or accum_freq, or pass more data"
            )

    def epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """An epoch's steps; batches left over at its end are not used."""
        if hasattr(self._info, "set_epoch"):
            self._info.set_epoch(epoch)
        group: list[Batch] = []
        for images, texts in self._batches:
            group.append((images, texts))
            if len(group) == self._accum_freq:
                yield group
                group = []

    @property
    def skipped(self) -> dict[str, int]:
        """What could not be read so far by this rank: names, and how many samples each stands for."""
        skips = getattr(self._info, "skips", None)
        return {} if skips is None else skips.samples


def build_loader(options: TrainOptions, built: Built, ranks: Ranks, epoch: int) -> TrainData:
    """The loader of ``options.train_data``."""
    _needs(built, built.preprocess_train)
    return load_train_data(
        options.data_options(),
        built.preprocess_train,
        built.tokenizer,
        world_size=ranks.world_size,
        rank=ranks.rank,
        epoch=epoch,
    )


def build_validation(
    options: TrainOptions, built: Built, precision: Precision, ranks: Ranks
) -> Callable[[nn.Module], dict[str, Any] | None] | None:
    """Retrieval on ``options.val_data``, as a function of the model that all ranks call; rank 0 gets the numbers."""
    if options.val_data is None:
        return None
    _needs(built, built.preprocess_val)
    share = Share(ranks.rank, ranks.world_size, ranks.gather)
    samples = load_eval_samples(options.val_data, built.preprocess_val, options.val_data_options(), "val_data")
    samples = samples.part(share, options.batch_size)

    def validate(model: nn.Module) -> dict[str, Any] | None:
        return evaluate_retrieval(
            model,
            samples,
            built.tokenizer,
            batch_size=options.batch_size,
            by="group",
            precision=precision,
            multi_positive=options.multi_positive,
            show_progress=ranks.first,
            share=share,
        )

    return validate


def _needs(built: Built, preprocess: Any) -> None:
    if preprocess is None or built.tokenizer is None:
        raise ValueError("to read data, a model that is passed in needs its preprocess and tokenizer passed too")
