"""Builds the parts of a run from its options: the model and the data loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..clip import word_tokenizer
from ..clip.flops import meta_copy
from ..clip.inputs import CheckedTokenizer
from ..data.loaders import load_train_data
from ..data.options import DataOptions, StepOptions
from ..data.train_data import TrainData
from ..models import architecture, factory, known_models, model_names, tokenizers
from ..models.state_dicts import listed
from ..moe.config import MoEConfig
from ..moe.layer import saved_config
from ..precision import Precision
from ..upcycling.upcycle import upcycle
from .checkpoints import open_clip_format
from .log.records import LOG
from .objectives import Objective, create_objective, selected
from .optim import lock_parts
from .optimizer_upcycling import named_state, upcycled_state
from .options import TrainOptions
from .ranks import parallel
from .ranks.distributed import Ranks

Transform = Callable[[Any], torch.Tensor]
"""PIL image to tensor."""
Tokenizer = Callable[[list[str]], torch.Tensor]
"""Texts to tokens [N, L]."""


class Built(NamedTuple):
    """A model and what belongs to it; ``None`` for what the caller did not give and nothing needs."""

    model: nn.Module
    objective: Objective
    preprocess_train: Transform | None
    preprocess_val: Transform | None
    tokenizer: Tokenizer | None
    model_cfg: dict[str, Any] | None
    """open_clip's architecture config; None when the model was passed in and ``options.model`` does not name it."""
    unsharded: nn.Module | None = None
    """Of a model that will be sharded: a copy without weights, hooks and meshes."""
    optimizer_state: dict[str, Any] | None = None
    """State dict that the optimizer starts with, carried over from ``options.resume_dense``."""
    tokenizer_files: dict[str, bytes] | None = None
    """Of the model's tokenizer as the run began, which checkpoints and the trained model bring; None like
    ``model_cfg``."""

    def reader(self, training: bool) -> tuple[Transform, Tokenizer]:
        """The transform and the tokenizer that data are read with.

        Raises:
            ValueError: one of them is None.
        """
        preprocess = self.preprocess_train if training else self.preprocess_val
        if preprocess is None or self.tokenizer is None:
            raise ValueError(
                "preprocess and tokenizer are missing: pass those of the model too, to read data with them"
            )
        return preprocess, self.tokenizer


def check_complete(options: TrainOptions, model: nn.Module | None, loader: Any) -> None:
    """Checks, before anything is built, that there is a model and data to train it on.

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
            "train_data is missing: pass --train-data with a CSV file or WebDataset shards (in Python also a loader). "
            "To measure a model without training it, use clipup eval"
        )
    if not options.moe and options.moe_cfg != MoEConfig.clip_up():
        raise ValueError("moe_cfg has no effect without moe=True, which makes the model sparse; set it too")


def build_model(
    options: TrainOptions,
    ranks: Ranks,
    precision: Precision,
    model: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
    resumed: bool = False,
) -> Built:
    """The model on its device, made sparse if ``options.moe`` is set, and the objective that it is trained with.

    Args:
        model: an existing model; ``options.model`` then only names its architecture, for saving.
        preprocess: the transform of training and validation images, or a pair of them.
        tokenizer: instead of the model's. Words are saved with the model; another one is not, which is a warning.
        resumed: whether weights and moments come from a checkpoint of the run.
    """
    given_tokenizer = tokenizer
    is_random = model is None and not known_models.has_weights(str(options.model), options.pretrained)
    transforms: tuple[Any, ...] = preprocess if isinstance(preprocess, tuple) else (preprocess, preprocess)
    if model is None:
        model, model_cfg, own_transforms, tokenizer, name = _create(options, ranks.device, precision, tokenizer)
        transforms = tuple(given or own for given, own in zip(transforms, own_transforms, strict=True))
    else:
        unused = ", ".join(_factory_arguments(options))
        if unused:
            raise ValueError(f"{unused}: no effect on a model that is passed in; create it, and its transforms, so")
        saved_config(model)  # refused before the run, not when it is saved
        model = model.to(ranks.device)
        name = options.model
        model_cfg = None if name is None else model_names.get_model_config(name)
    tokenizer_files = None
    if model_cfg is not None:
        model_cfg = architecture.with_logit_bias(model_cfg, getattr(model, "logit_bias", None))
        found = architecture.differences(model, model_cfg, saved_config(model))
        if found:
            raise ValueError(
                f"model: it is another than {name!r}, as which it would be saved: {listed(found)}. Give the name of "
                "the model that is trained, or leave model out of the options (then no model directory is saved; "
                "to resume a run with model, add resume_with_changes)"
            )
        tokenizer_files = _tokenizer_files(given_tokenizer, model_cfg, str(name))
    optimizer_state = None
    if options.resume_dense is not None and not resumed:
        optimizer_state = _resume_dense(model, options.resume_dense, options, tokenizer_files)
    if options.moe:
        if is_random and not resumed and options.resume_dense is None:
            LOG.warning(
                "model has random weights: all experts of a layer start as copies of one random MLP; to upcycle a "
                "trained model, pass --pretrained"
            )
        model = upcycle(model, options.moe_cfg, inplace=True)
    parallel.check(model, options, ranks, precision)
    lock_parts(model, options)
    objective = create_objective(options, model, ranks, precision)
    if options.grad_checkpointing:
        clip: Any = model  # nn.Module types what it does not know as Tensor | Module
        clip.set_grad_checkpointing()
    if options.torchcompile:
        model.compile(backend=options.torchcompile_backend or "inductor", mode=options.torchcompile_mode)
    return Built(
        model,
        objective,
        preprocess_train=transforms[0],
        preprocess_val=transforms[1],
        tokenizer=tokenizer,
        model_cfg=model_cfg,
        unsharded=meta_copy(model) if options.is_sharded else None,
        optimizer_state=optimizer_state,
        tokenizer_files=tokenizer_files,
    )


def _tokenizer_files(given: Any, model_cfg: dict[str, Any], name: str) -> dict[str, bytes]:
    """The files to save of the model's tokenizer.

    Args:
        given: a tokenizer that was passed in. Its words are saved; another one is not, which is a warning.
    """
    text_cfg = model_cfg["text_cfg"]
    if isinstance(given, word_tokenizer.WordTokenizer) and word_tokenizer.uses_words(text_cfg):
        text = "\n".join(given.words) + "\n"
        word_tokenizer.from_text(text, text_cfg)
        return {word_tokenizer.FILE_NAME: text.encode("utf-8")}
    if given is not None:
        LOG.warning("the tokenizer that is passed in is not saved; keep its files, unless it is that of %s", name)
    return tokenizers.files_of(text_cfg, tokenizers.source_directory(name))


def _resume_dense(
    model: nn.Module, path: str, options: TrainOptions, tokenizer_files: dict[str, bytes] | None
) -> dict[str, Any]:
    """Loads a dense run's weights into the model, and returns the optimizer's state dict for the sparse model.

    Raises:
        ValueError: the run trained another model than the one that is given, or with another tokenizer.
    """
    state = open_clip_format.load(path)
    open_clip_format.check_configs(model, state, tokenizer_files, path)
    open_clip_format.restore(model, state["state_dict"], path)
    moments = upcycled_state(model, options.moe_cfg, named_state(model, state["optimizer"], path))
    names = list(moments)
    return {"state": moments, "param_groups": [{"params": names, "param_names": names}]}


def _create(options: TrainOptions, device: torch.device, precision: Precision, tokenizer: Any) -> tuple[Any, ...]:
    name, pretrained = factory.name_and_weights(options.model, options.pretrained)
    model_cfg = architecture.overridden(model_names.get_model_config(name), options.model_overrides())
    fresh = pretrained is None and model_names.directory_of(name) is None
    init: dict[str, Any] = selected(options).model_arguments if fresh else {}
    model, *transforms = factory.create_model_and_transforms(
        name, pretrained, precision=precision, device=device, output_dict=True, **init, **_factory_arguments(options)
    )
    if tokenizer is None:
        length = options.force_context_length
        tokenizer = tokenizers.get_tokenizer(name, **({} if length is None else {"context_length": length}))
    return model, {**model_cfg, **init}, transforms, tokenizer, name


def _factory_arguments(options: TrainOptions) -> dict[str, Any]:
    """Arguments of open_clip's factory about architecture and transforms, as far as the options set them."""
    return {**options.model_overrides(), **options.transform_arguments()}


def build_loader(options: TrainOptions, built: Built, ranks: Ranks, epoch: int) -> TrainData:
    """The loader of ``options.train_data``."""
    preprocess, tokenizer = built.reader(training=True)
    return load_train_data(
        DataOptions.of(
            options, StepOptions(batch_size=options.batch_size, accum_freq=options.accum_freq, seed=options.seed)
        ),
        preprocess,
        CheckedTokenizer(tokenizer, built.model).check(),
        world_size=ranks.world_size,
        rank=ranks.rank,
        epoch=epoch,
    )
