"""``train``: from options to a finished run. It alone reads all options, and gives each component its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clipup_kernels.self_check import check_once

from ..clip.flops import meta_copy
from ..clip.inputs import CheckedTokenizer
from ..data.loaders import load_train_data
from ..evaluate.shares import Share
from ..models import model_names
from ..moe.config import MoEConfig
from ..precision import token_dtype
from .cards import pairs_per_second_at_peak
from .checkpoints import resume
from .checkpoints.checkpointer import Checkpointer
from .checkpoints.directory import RunDirectory
from .checkpoints.position import RunState
from .evaluations import validations
from .log.records import LOG
from .log.reports import Reports
from .log.trackers import check_installed
from .loop import Seeds, Trainer, seed_everything
from .objectives.selection import create_objective, selected
from .optimizer.groups import create_optimizer
from .optimizer.locks import lock_parts
from .optimizer.schedule import Schedule
from .parallel import sharding, whole_state
from .parallel.ranks import Ranks, joined
from .result import Every, TrainResult
from .setup import build_model, speed_up
from .signals import StopRequest
from .step import TrainStep
from .train_options import RESUMED, TrainOptions
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
        model: trained instead of the model that ``options.model`` names.
        preprocess: image transform, or (training, validation) pair; None takes the built model's own.
        tokenizer: texts to token ids; None takes the built model's own.
        loader: batches (images, texts) instead of ``options.train_data``: ``TrainData``, or anything with a
            length that can be iterated repeatedly. Its order may depend on torch's global generator and on its
            ``set_epoch``; a generator of its own is not resumed. Set ``options.steps`` or ``options.epochs``.
        callbacks: evaluations along the way.

    Raises:
        FileExistsError: the directory of the run holds another run, or newer checkpoints than the resumed one.
        DirectoryInUse: another process writes into it.
        ValueError: options or data that cannot be trained on, or a checkpoint that cannot be resumed from.
        NonFiniteGradients, NonFiniteWeights: values became NaN or infinite.
        ChildProcessError: a data worker was killed.
        ConnectionError: another rank died, failed, or has kept this one waiting for ``options.dist_timeout``.
        OSError: a checkpoint could not be written, and the checkpoint before it is whole; or could not be read.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP, after a checkpoint. Without ``options.logs`` it is
            KeyboardInterrupt, at once.
    """
    _check_complete(options, model, loader)
    with joined(options.processes, options.speed.device) as ranks, _directory(options, ranks) as directory:
        precision = options.precision_on(ranks.device.type)
        if ranks.device.type == "cuda":
            check_once(ranks.device, [token_dtype(precision)])
        resumed, notes = resume.find_checkpoint(options.checkpoints, directory, ranks)
        if resumed is not None:
            if options.optimizer.warmup is None:
                options = options.changed(warmup=resumed.options.get("warmup"))
            conditions = resume.Conditions(options.values(), RESUMED, ranks.world_size)
            notes += resume.changes(resumed, conditions, options.checkpoints.resume_with_changes)

        seed_everything(options.step.seed)
        built = build_model(
            options.model,
            options.transforms,
            options.moe_cfg,
            ranks.device,
            precision,
            model=model,
            preprocess=preprocess,
            tokenizer=tokenizer,
            resumed=resumed is not None,
            new_model=selected(options.loss).model_arguments,
        )
        model = built.model
        sharding.check(model, options.parallel, ranks)
        lock_parts(model, options.trained_parts)
        objective = create_objective(options.loss, model, ranks, precision)
        speed_up(model, options.speed)
        unsharded = meta_copy(model) if options.parallel.is_sharded else None
        pairs_at_peak = pairs_per_second_at_peak(model, ranks.device, ranks.world_size)

        if loader is None:
            transform, words = built.reader(training=True)
            loader = load_train_data(
                options.data,
                options.step,
                transform,
                CheckedTokenizer(words, model).check(),
                world_size=ranks.world_size,
                rank=ranks.rank,
                epoch=resumed.state["epoch"] if resumed else 0,
            )
        data = Epochs(loader, options.step.accum_freq)
        data.check_alike(ranks.gather_patiently)  # some may have had to list their data first
        options = options.changed(warmup=Schedule(options.optimizer, data.steps).warmup)
        share = Share(ranks.rank, ranks.world_size, ranks.gather_patiently, in_step=options.parallel.is_sharded)
        multi_positive, batch_size = options.loss.multi_positive, options.step.batch_size
        measured = validations(options.evaluation, options.data, built, share, batch_size, precision, multi_positive)

        wrapped = sharding.wrapped(model, options.parallel, ranks, precision)
        optimizer = create_optimizer(model, options.optimizer)
        if built.optimizer_state is not None:
            whole_state.load_optimizer_state(optimizer, model, built.optimizer_state)
            built.optimizer_state = None  # whole, while the optimizer's may be sharded
        state = RunState()
        seeds = Seeds(options.step, state, ranks.rank)
        clip = options.optimizer.grad_clip_norm
        step = TrainStep(wrapped, objective, optimizer, ranks.device, precision, clip, ranks.world_size, seeds.of_batch)
        values = options.values()
        conditions = resume.Conditions(values, RESUMED, ranks.world_size, data.steps, data.order)
        checkpoints = Checkpointer(
            options.checkpoints, directory, ranks, model, optimizer, state, conditions, built.configs(), step.scaler
        )
        save_model = None
        if directory is not None:
            base_model = model_names.base_model(options.model.model, options.model.pretrained)
            save_model = partial(built.save, directory.model, base_model, unsharded)
        schedule = Schedule(options.optimizer, data.steps)
        trainer = Trainer(step, data, schedule, seeds, checkpoints, measured, callbacks, save_model)
        continues = resumed is not None and resumed.other_run is None
        if resumed is not None:
            same_optimizer = resumed.options.get("opt", options.optimizer.opt) == options.optimizer.opt
            trainer.restore(resumed.state, resumed.path, resumed.other_run, same_optimizer)
            notes += resume.data_changes(resumed, conditions)
            if state.finished:
                return trainer.result_before()
            resumed = None  # its tensors, in every process
        notes += [*built.notes, *trainer.schedule.notes()]
        for note in notes if ranks.first else ():
            LOG.warning("%s", note)
        with StopRequest(enabled=directory is not None) as stop:
            root = None if directory is None else directory.root
            if directory is not None:
                ranks.on_first(partial(check_installed, options.reports))
                ranks.on_first(partial(directory.prepare, values, trainer.start))
            reports = Reports(
                options.reports, values, model, state, schedule.steps, ranks, root, continues, notes, pairs_at_peak
            )
            return trainer.run(stop, reports)


def _check_complete(options: TrainOptions, model: nn.Module | None, loader: Any) -> None:
    """Checks, before anything is built, that there is a model and data to train it on.

    Raises:
        ValueError: one is missing, or ``moe_cfg`` is meant for a model that is not made sparse.
    """
    named, pretrained = options.model.model, options.model.pretrained
    if model is None and named is None and not (pretrained is not None and Path(pretrained).is_dir()):
        raise ValueError(
            "model is missing: pass a name that open_clip knows, such as --model ViT-B-16, or a directory with a saved "
            "model"
        )
    if loader is None and options.data.train_data is None:
        raise ValueError(
            "train_data is missing: pass --train-data with a CSV file or WebDataset shards (in Python also a loader). "
            "To measure a model without training it, use clipup eval"
        )
    if not options.model.moe and options.sparse.moe_cfg != MoEConfig.clip_up():
        raise ValueError(
            "moe_cfg has no effect without moe=True, which makes a dense model sparse; of a sparse model set the "
            "config of each of clipup.moe_layers(model), and pass the model"
        )


@contextmanager
def _directory(options: TrainOptions, ranks: Ranks) -> Iterator[RunDirectory | None]:
    """The run's directory, locked by rank 0 and otherwise untouched. What rank 0 refuses is refused on every rank."""
    if options.checkpoints.logs is None:
        yield None
        return
    directory = RunDirectory(Path(options.checkpoints.logs) / ranks.on_first(lambda: _name(options)))
    with ExitStack() as locks:
        ranks.on_first(lambda: locks.enter_context(directory.locked(options.checkpoints)))
        yield directory


def _name(options: TrainOptions) -> str:
    """The name in the options, or one from date, model and learning rate."""
    if options.checkpoints.name:
        return options.checkpoints.name
    model = Path((options.model.model or options.model.pretrained or "given").removesuffix("/")).name
    return f"{datetime.now():%Y_%m_%d-%H_%M_%S}-model_{model}-lr_{options.optimizer.lr}"
