"""Builds the model of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .. import checks
from ..clip import word_tokenizer
from ..models import architecture, factory, known_models, model_names, saving, tokenizers
from ..models.state_dicts import listed
from ..moe.config import MoEConfig
from ..moe.layer import saved_config
from ..precision import Precision
from ..upcycling.upcycle import upcycle
from .checkpoints import file
from .checkpoints.format import load
from .log.records import LOG
from .model_options import ImageTransformOptions, ModelOptions, SpeedOptions
from .optimizer.dense_moments import named_state, upcycled_state
from .parallel.ranks import Ranks
from .parallel.whole_state import gathered

Transform = Callable[[Any], torch.Tensor]
"""PIL image to tensor."""
Tokenizer = Callable[[list[str]], torch.Tensor]
"""Texts to tokens [N, L]."""


@dataclass
class Built:
    """A model and what belongs to it; ``None`` for what the caller did not give and nothing needs."""

    model: nn.Module
    preprocess_train: Transform | None
    preprocess_val: Transform | None
    tokenizer: Tokenizer | None
    model_cfg: dict[str, Any] | None
    """open_clip's architecture config; None when the model was passed in and ``options.model`` does not name it."""
    tokenizer_files: dict[str, bytes] | None = None
    """Of the model's tokenizer as the run began, which checkpoints and the trained model bring; None like
    ``model_cfg``."""
    optimizer_state: dict[str, Any] | None = None
    """State dict that the optimizer starts with, carried over from ``options.resume_dense``."""
    notes: list[str] = field(default_factory=list)
    """For the log, once nothing is refused any more."""

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

    def save(
        self,
        path: Path,
        base_model: str | None,
        unsharded: nn.Module | None,
        ranks: Ranks,
        results: list[dict[str, Any]],
    ) -> None:
        """Writes the model directory, which loads without the run. A collective.

        Args:
            base_model: for the model card, like ``results`` of evaluations.
            unsharded: a copy of a sharded model without weights, hooks and meshes.
        """
        if self.model_cfg is None:
            return
        weights = gathered(self.model.state_dict(), keep=ranks.first)

        def write() -> None:
            model, files = self.model, self.tokenizer_files
            if unsharded is not None:
                model = unsharded
                model.load_state_dict(weights, assign=True)
            saving.save_with_tokenizer(model, path, self.model_cfg, files, base_model=base_model, results=results)

        ranks.on_first(write)

    def configs(self) -> dict[str, Any]:
        """Configs that let a checkpoint load on its own: ``Weights.configs``."""
        files, moe_config = self.tokenizer_files, saved_config(self.model)
        preprocess_cfg = getattr(getattr(self.model, "visual", None), "preprocess_cfg", None)
        return {
            "model_cfg": self.model_cfg,
            "moe_cfg": None if moe_config is None else moe_config.to_dict(),
            "preprocess_cfg": None if preprocess_cfg is None else saving.preprocess_fields(preprocess_cfg),
            "tokenizer_files": None if files is None else tokenizers.for_checkpoint(files),
        }


def build_model(
    options: ModelOptions,
    transforms: ImageTransformOptions,
    moe: MoEConfig | None,
    device: torch.device,
    precision: Precision,
    model: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
    resumed: bool = False,
    new_model: Mapping[str, Any] = MappingProxyType({}),
) -> Built:
    """The model on its device, made sparse if ``moe`` is given.

    Args:
        model: an existing model; ``options.model`` then only names its architecture, for saving. preprocess: the
        transform of training and validation images, or a pair of them. tokenizer: used instead of the model's. A word
        tokenizer is saved with the model; for others a warning is logged. resumed: whether weights and moments come
        from a checkpoint of the run. new_model: arguments for creating an open_clip model with random weights.
    """
    given_tokenizer = tokenizer
    is_random = model is None and not known_models.has_weights(str(options.model), options.pretrained)
    given: tuple[Any, ...] = preprocess if isinstance(preprocess, tuple) else (preprocess, preprocess)
    arguments = {**options.model_overrides(), **transforms.transform_arguments()}
    if model is None:
        name, pretrained = factory.name_and_weights(options.model, options.pretrained)
        model_cfg: Any = architecture.overridden(model_names.get_model_config(name), options.model_overrides())
        fresh = new_model if pretrained is None and model_names.directory_of(name) is None else {}
        model_cfg = {**model_cfg, **fresh}
        with factory.expecting_random_weights():  # the note below knows whether a checkpoint replaces them
            model, *own = factory.create_model_and_transforms(
                name, pretrained, precision=precision, device=device, output_dict=True, **fresh, **arguments
            )
        given = tuple(transform or usual for transform, usual in zip(given, own, strict=True))
        if tokenizer is None:
            length = options.force_context_length
            tokenizer = tokenizers.get_tokenizer(name, **({} if length is None else {"context_length": length}))
    else:
        if arguments:
            raise ValueError(
                f"{', '.join(arguments)}: no effect on a model that is passed in; create it, and its transforms, so"
            )
        saved_config(model)  # refused before the run, not when it is saved
        model = model.to(device)
        model_cfg = None if options.model is None else model_names.get_model_config(options.model)
        name = str(options.model)
    checks.plain_weights("model", model)
    built = Built(model, given[0], given[1], tokenizer, model_cfg)
    if model_cfg is not None:
        built.model_cfg = model_cfg = architecture.with_logit_bias(model_cfg, getattr(model, "logit_bias", None))
        if differences := architecture.differences(model, model_cfg, saved_config(model)):
            raise ValueError(
                f"model: it is another than {name!r}, as which it would be saved: {listed(differences)}. Give the name "
                "of the model that is trained, or leave model out of the options (then no model directory is saved; "
                "to resume a run with model, add resume_with_changes)"
            )
        built.tokenizer_files = _tokenizer_files(given_tokenizer, model_cfg, name)
    if options.resume_dense is not None and moe is not None and not resumed:
        built.optimizer_state = _resume_dense(built, options.resume_dense, moe)
    if is_random and not resumed and options.resume_dense is None:
        experts = "" if moe is None else ": all experts of a layer start as copies of one random MLP"
        built.notes.append(f"pretrained: not given, so the model starts from new weights, not trained ones{experts}")
    if moe is not None:
        built.model = upcycle(model, moe, inplace=True)
    return built


def speed_up(model: Any, options: SpeedOptions) -> None:
    """Checkpointing and compilation, as the options say."""
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if options.torchcompile:
        model.compile(backend=options.torchcompile_backend or "inductor", mode=options.torchcompile_mode)


def _tokenizer_files(given: Any, model_cfg: dict[str, Any], name: str) -> dict[str, bytes]:
    """The files to save of the model's tokenizer.

    Args:
        given: a tokenizer that was passed in. A word tokenizer is saved; for others a warning is logged.
    """
    text_cfg = model_cfg["text_cfg"]
    if isinstance(given, word_tokenizer.WordTokenizer) and word_tokenizer.uses_words(text_cfg):
        text = "\n".join(given.words) + "\n"
        word_tokenizer.from_text(text, text_cfg)
        return {word_tokenizer.FILE_NAME: text.encode("utf-8")}
    if given is not None:
        LOG.warning("the tokenizer that is passed in is not saved; keep its files, unless it is that of %s", name)
    return tokenizers.files_of(text_cfg, tokenizers.source_directory(name))


def _resume_dense(built: Built, path: str, moe: MoEConfig) -> dict[str, Any]:
    """Loads a dense run's weights into the model, and returns the optimizer's state dict for the sparse model.

    Raises:
        ValueError: the run trained another model than the given one, or with another tokenizer.
    """
    checkpoint, model = load(path), built.model
    factory.check_configs(model, checkpoint, path)
    tokenizers.check_same(built.tokenizer_files, checkpoint, path)
    file.restore(Path(path), checkpoint, model, optimizer=None)
    moments = upcycled_state(model, moe, named_state(model, checkpoint["optimizer"], path))
    names = list(moments)
    return {"state": moments, "param_groups": [{"params": names, "param_names": names}]}
