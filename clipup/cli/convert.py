"""``clipup convert``: makes a model directory of a training checkpoint, or one in int8 of any model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..models import known_models
from ..option_group import OptionGroup, option
from .flags import parse
from .outputs import empty_directory

_ONLY_INT8 = {"without --int8": lambda group: not group.int8}


@dataclass(kw_only=True)
class Options(OptionGroup):
    """Makes a model directory (a config, weights as safetensors, a card) of a checkpoint of clipup train, sharded or in
    one file. Nothing in the checkpoint is executed. clipup eval, inspect and upcycle, and
    clipup.create_model_and_transforms read the directory. With --int8 it holds the model as clipup.accelerate(model,
    weights="int8") makes it, for CPUs, and can be made of every model.

    Example: clipup convert logs/b16-moe/checkpoints/epoch_3 models/b16-moe
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A directory epoch_K or step_N of a sharded checkpoint, or a file epoch_K.pt, also of open_clip's trainer. With
    --int8 also the directory of a model or a run, a model name of open_clip, or hf-hub:ORG/NAME."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the model. It must be empty or not exist."""
    model: str | None = None
    """The model that was trained, as its run named it, for a checkpoint without its config or its tokenizer."""
    int8: bool = False
    """Quantize experts, MLPs, attention and patch embeddings. A B/16's file takes two fifths of float32's,
    one of CLIP-UP B/16 three tenths; it loads without float32 in memory."""
    pretrained: str | None = option(None, idle=_ONLY_INT8)
    """Tag or file of weights, for a model given by name."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup convert")
    from ..models.checkpoint_model import save_checkpoint_model
    from ..models.shard_files import is_sharded

    source = Path(options.source)
    with empty_directory(options.out), tempfile.TemporaryDirectory() as temporary:
        if not options.int8 or source.is_file() or is_sharded(source):
            plain = Path(temporary) if options.int8 else options.out
            save_checkpoint_model(source, plain, options.model)
            options.source = f"{known_models.LOCAL_PREFIX}{plain}"
        if options.int8:
            save_in_int8(options.source, options.pretrained, options.out)
    print(f"saved to {options.out}")
    return 0


def save_in_int8(source: str, pretrained: str | None, out: Path) -> None:
    """The model of a name, a directory or a run, quantized."""
    from ..models import architecture, model_names, saving, tokenizers
    from .runs import load_for_inference, model_of

    model_names.refuse_random_weights("pretrained", source, pretrained)
    base_model = model_names.base_model(source, pretrained)
    with model_of(source) as name:
        model_cfg = model_names.get_model_config(name)
        files = tokenizers.files_of(model_cfg["text_cfg"], tokenizers.source_directory(name))
        model, *_ = load_for_inference(name, pretrained, int8=True)
        model_cfg = architecture.with_logit_bias(model_cfg, getattr(model, "logit_bias", None))
        saving.save_with_tokenizer(model, out, model_cfg, files, base_model=base_model)
