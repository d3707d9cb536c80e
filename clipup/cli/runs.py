"""The models that names and directories on the command line stand for."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..inference.accelerate import for_inference
from ..models import factory, model_names, tokenizers
from ..models.checkpoint_model import save_checkpoint_model
from ..models.model_directory import CONFIG_NAME, of_transformers
from ..precision import Precision
from ..train.checkpoints import kept
from ..train.checkpoints.directory import RunDirectory
from ..train.log.records import read_records


def model_directory(name: str) -> Path | None:
    """The directory of the model that a directory stands for; None for other names, and for runs that go on."""
    root = model_names.directory_of(name)
    return root if root is not None and (root / CONFIG_NAME).is_file() else None


@contextmanager
def model_of(name: str) -> Iterator[str]:
    """The model that a name, a model's directory or a training run's stands for, as ``factory`` takes it.

    For a run that goes on, this is its newest checkpoint, in a directory that is removed afterwards.

    Raises:
        FileNotFoundError: a directory holds neither a model nor a checkpoint.
    """
    root = model_names.directory_of(name)
    if root is None:
        yield name
        return
    directory = model_directory(name)
    if directory is not None:
        yield f"{model_names.LOCAL_PREFIX}{directory}"
        return
    latest = kept.newest(RunDirectory(root).checkpoints)
    if latest is None:
        raise FileNotFoundError(
            f"{root} holds neither a model ({CONFIG_NAME}, or the model/ of a finished run) nor a run's checkpoints"
            f"{of_transformers(root)}"
        )
    for reason in latest.passed_over:
        print(f"clipup: reads {latest.path}, because a checkpoint cannot be used: {reason}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        save_checkpoint_model(latest.path, Path(temporary))
        yield f"{model_names.LOCAL_PREFIX}{temporary}"


def trained_steps(directory: Path) -> int | None:
    """Steps of a finished run, from its directory or that of its model; None for any other directory."""
    run = RunDirectory(directory.parent if directory.name == "model" else directory)
    records = read_records(run.root / "metrics.jsonl") if (run.model / CONFIG_NAME).is_file() else []
    return records[-1]["step"] if records else None


def load_for_inference(
    name: str, pretrained: str | None = None, precision: Precision = "fp32", int8: bool = False, device: str = "cpu"
) -> tuple[nn.Module, Any, Any]:
    """Model, transform of images and tokenizer of what ``model_of`` takes."""
    with model_of(name) as model_name:
        model, _, preprocess = factory.create_model_and_transforms(
            model_name, pretrained, precision=precision, device=device
        )
        tokenizer = tokenizers.get_tokenizer(model_name)
    return for_inference(model, precision, "int8" if int8 else None), preprocess, tokenizer
