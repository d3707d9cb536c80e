"""``train``: from options to a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from clipup_kernels.self_check import check_once

from ..precision import token_dtype
from . import resume
from .checkpoints.run_directory import RunDirectory, run_name
from .checkpoints.run_state import Length
from .log.records import LOG, Every, TrainResult
from .loop import Trainer, seed_everything
from .optim import warmup_steps
from .options import TrainOptions
from .ranks.distributed import Ranks, joined
from .setup import build_loader, build_model, check_complete
from .signals import StopRequest
from .training_data import Epochs


def train(
    options: TrainOptions,
    *,
    model: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
    loader: Any = None,
    callbacks: Sequence[Every] = (),
) -> TrainResult:
    """Trains a model with the loss that the options select and the sparse layers' losses.

    Args:
        options: everything that the command line can set.
        model: trained instead of one built from ``options.model``.
        preprocess: image transform, or (training, validation) pair; None takes the built model's own.
        tokenizer: texts to token ids; None takes the built model's own.
        loader: batches (images, texts) instead of ``options.train_data``: ``TrainData``, or anything with a
            length that can be iterated repeatedly. Its order may depend on torch's global generator and on its
            ``set_epoch``; a generator of its own is not resumed. Set ``options.steps`` or ``options.epochs``.
        callbacks: evaluations along the way.

    Raises:
        FileExistsError: the directory of the run holds another run, or newer checkpoints than the one to resume from.
        DirectoryInUse: another process writes into it.
        ValueError: options or data that cannot be trained on, or a checkpoint that cannot be resumed from.
        NonFiniteGradients, NonFiniteWeights: values became NaN or infinite.
        ChildProcessError: a data worker was killed.
        ConnectionError: another rank died, failed, or has kept this one waiting for ``options.dist_timeout``.
        OSError: a checkpoint could not be written, and the one before is whole; or one could not be read.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP, after a checkpoint. Without ``options.logs`` it is
            KeyboardInterrupt, at once.
    """
    check_complete(options, model, loader)
    with joined(options) as ranks, _directory(options, ranks) as directory:
        precision = options.precision_on(ranks.device.type)
        if ranks.device.type == "cuda":
            check_once(ranks.device, [token_dtype(precision)])
        checkpoint, start, notes = resume.find_checkpoint(options, directory, ranks)
        if checkpoint is not None:
            if options.warmup is None:
                former = checkpoint.state.get("conditions", {}).get("options", {})  # open_clip_train's has none
                options = replace(options, warmup=former.get("warmup"))
            notes += resume.changes(checkpoint.state, options, ranks.world_size, checkpoint.path)
        seed_everything(options.seed)
        built = build_model(options, ranks, precision, model, preprocess, tokenizer, checkpoint is not None)
        first_epoch = checkpoint.state["epoch"] if checkpoint else 0
        data = Epochs(
            build_loader(options, built, ranks, first_epoch) if loader is None else loader, options.accum_freq
        )
        data.check_alike(ranks.gather_patiently)  # some may have had to list their data first
        options = replace(options, warmup=warmup_steps(options, Length.of(options, data.steps, 0).steps))
        trainer = Trainer(options, built, data, ranks, directory, precision, callbacks)
        if checkpoint is not None:
            trainer.restore(checkpoint.state, checkpoint.path, start)
            if trainer.state.finished:
                return trainer.result_before()
            checkpoint = None  # its tensors, in every process
        for note in notes if ranks.first else ():
            LOG.warning("%s", note)
        with StopRequest(enabled=directory is not None) as stop:
            return trainer.run(stop, notes)


@contextmanager
def _directory(options: TrainOptions, ranks: Ranks) -> Iterator[RunDirectory | None]:
    """The run's directory, locked by rank 0 and otherwise untouched. What rank 0 refuses is refused on every rank."""
    if options.logs is None:
        yield None
        return
    directory = RunDirectory(Path(options.logs) / ranks.first_does(lambda: run_name(options)))
    with ExitStack() as held:
        ranks.first_does(lambda: held.enter_context(directory.locked(options)))
        yield directory
