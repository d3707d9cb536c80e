"""Runs or resumes a run of a study with clipup's training and evaluation, on one CPU thread or a GPU.

RUNS/NAME holds everything needed to resume a killed run (checkpoints, metrics); the log is written from it at the end.
On the same machine's CPU, the same config gives a bitwise equal log, however often the run was stopped.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from clipup.atomic_files import replace_files
from clipup.clip.flops import count
from clipup.data.loaders import describe, eval_samples, train_loader
from clipup.models import factory, tokenizers
from clipup.precision import check_device
from clipup.train import Every, TrainOptions, TrainResult, train
from clipup.upcycling.clusters import initialize_by_clusters
from clipup.upcycling.step0 import step0_difference
from clipup.upcycling.upcycle import upcycle
from clipup_kernels.machine import describe_machine
from studies import fixed_texts
from studies.icon_data.views import FreshViews

from . import log, measure
from .choices import replace_routers
from .config import StudyRun

_ABOUT_DATA = ("name", "fingerprint", "options", "source", "vocabulary", "skipped", "left_out_twins")
_EVALUATIONS = 10
_LOG_EVERY, _SAVE_EVERY = 10, 500
_CLUSTERED = 16  # batches
_BEGAN_WITH = ".config.json"
_WEIGHTS = "weights.safetensors"
_BACKWARD = 2  # FLOPs of the backward pass over those of the forward pass


def run(
    runs: Mapping[str, StudyRun], name: str, data: str | Path, runs_directory: str | Path, logs: str | Path, device: str
) -> Path:
    """Runs one run of a study unless it has a log; before it, the run that it starts from unless that has a model.

    Args:
        runs: those of the study (``config.read``).
        data: directory of the data set: training data, and the splits validation and test... .
        runs_directory: for checkpoints and models, one directory per run.
        logs: directory of the logs.
        device: where to train and evaluate; on the CPU with one thread.

    Returns:
        The log's path.

    Raises:
        FileNotFoundError, ValueError, TypeError: the config, the data or the device.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP; the same call resumes.
    """
    check_device(device)

    def log_of(name: str) -> Path:
        return Path(logs) / f"{name}{log.SUFFIX}"

    def make(name: str) -> None:
        config = runs[name]
        if config.start is not None and not _model(runs_directory, config.start).is_dir():
            make(config.start)
        _keep_config(config, runs_directory)
        records = _Run(config, data, runs_directory, device).records()
        path = log_of(name)
        if not path.is_file() or log.reproducible(log.read(path)) != log.reproducible(records):
            log.write(path, records)  # an equal log is kept, with the cost of the first time

    if not log_of(name).is_file():
        make(name)
    return log_of(name)


def _keep_config(config: StudyRun, runs_directory: str | Path) -> None:
    """Saves the config of a run before its first step.

    Raises:
        ValueError: the run was begun with another one, so its log would describe a run that was never made.
    """
    path = Path(runs_directory) / f"{config.name}{_BEGAN_WITH}"
    text = json.dumps({key: value for key, value in config.to_dict().items() if key != "why"}, indent=1) + "\n"
    begun = path.with_name(config.name)
    if begun.is_dir() and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{config.name} was begun with another config, {path}: restore it, or delete {begun} to begin again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class _Run:
    """One run: its model, data, training and log records."""

    def __init__(self, config: StudyRun, data: str | Path, runs_directory: str | Path, device: str = "cpu") -> None:
        if torch.device(device).type == "cpu":
            torch.set_num_threads(1)
        self.config, self.data, self.runs, self.device = config, Path(data), Path(runs_directory), device
        self.dataset = describe(data)
        _, _, self.preprocess = _create(config.model, load_weights=False)
        self.fixed = fixed_texts.read(self.data)
        self.tokenizer = _tokenizer(self.fixed, config.model)
        self.model, self.step0 = self._model()

    def records(self) -> list[log.Record]:
        result = self._train()
        tests = [split for split in self.dataset["splits"] if split[:4] == "test" and not self.config.validation_only]
        test = {
            split: self._measure(result.model, self._samples(split), self.config.views)
            for split in (*tests, "validation")
        }
        data = {key: self.dataset[key] for key in _ABOUT_DATA if key in self.dataset}
        data["images"] = {split: content["images"] for split, content in self.dataset["splits"].items()}
        return [
            {"kind": "run", **self.config.to_dict(), "data": data, "step0_difference": self.step0},
            *log.training(result.history, result.steps),
            *(
                {"kind": "validation", "step": evaluation["step"], **evaluation["numbers"]}
                for evaluation in result.evaluations
            ),
            {"kind": "test", **test},
            *self._layers(result),
            self._cost(result),
        ]

    def _model(self) -> tuple[nn.Module, float | None]:
        """The model before its first step, and an upcycled one's difference from its dense model."""
        config = self.config
        torch.manual_seed(config.seed)
        if config.start is None:
            number = 1 if config.moe_cfg is None else config.moe_cfg.num_experts
            models = [self._dense() for _ in range(number)]
            return (models[0] if config.moe_cfg is None else upcycle(models, config.moe_cfg)), None
        dense = self._dense()
        if config.moe_cfg is None:
            return dense, None
        sparse = upcycle(dense, config.moe_cfg)
        if config.choice:
            replace_routers(sparse.visual, config.choice)
        if config.clusters:
            loader = self._loader()
            loader.set_epoch(0)
            batches = itertools.islice(getattr(loader, "dataloader", loader), _CLUSTERED)
            initialize_by_clusters(sparse, batches, seed=config.seed)
        return sparse, step0_difference(dense, sparse)

    def _dense(self) -> nn.Module:
        """A dense model as the run that this one starts from has trained it, or with random weights."""
        start = self.config.start and _model(self.runs, self.config.start)
        if self.fixed is None:
            return _create(str(start))[0] if start else _create(self.config.model, load_weights=False)[0]
        vectors, _ = self.fixed
        shape = {"force_custom_text": True, "embed_dim": vectors.shape[1]}
        model, *_ = _create(self.config.model, load_weights=False, **shape)
        model.text = fixed_texts.FixedTexts(vectors)
        if start:
            load_model(model, start / _WEIGHTS)
        return model

    def _train(self) -> TrainResult:
        config = self.config
        options = TrainOptions.flat(
            model=config.model if self.fixed is None else None,
            logs=str(self.runs),
            name=config.name,
            resume="latest",
            steps=config.steps,
            lr=config.lr,
            wd=config.wd,
            warmup=config.warmup,
            grad_clip_norm=config.grad_clip_norm,
            batch_size=config.batch_size,
            precision=config.precision,
            multi_positive=True,
            device=self.device,
            seed=config.seed,
            save_frequency=0,
            save_every_n_steps=_SAVE_EVERY,
            log_every_n_steps=_LOG_EVERY,
        )
        loader, validation = self._loader(), self._samples("validation")

        def validate(model: nn.Module) -> dict[str, Any]:
            numbers = self._measure(model, validation)
            cosines = measure.expert_cosines(model)
            return {"numbers": numbers | ({"similarity": sum(cosines.values()) / len(cosines)} if cosines else {})}

        every = max(1, config.steps // _EVALUATIONS)
        result = train(options, model=self.model, loader=loader, callbacks=[Every(every, validate)])
        if self.fixed is not None:  # no config of a model describes it
            directory = _model(self.runs, config.name)
            directory.mkdir(exist_ok=True)
            replace_files({directory / _WEIGHTS: partial(save_model, result.model)})
        return result

    def _loader(self) -> Any:
        config = self.config
        data = _training_data(self.data, self.dataset["fingerprint"], config.model, config.batch_size, config.seed)
        return replace(data, dataloader=FreshViews(data, config.seed)) if config.views else data

    def _samples(self, split: str) -> list[Any]:
        return list(eval_samples(self.data / f"{split}-*.tar", self.preprocess))

    def _measure(self, model: nn.Module, samples: list[Any], best_temperature: bool = False) -> dict[str, Any]:
        return measure.retrieval_numbers(model, samples, self.tokenizer, best_temperature)

    def _layers(self, result: TrainResult) -> list[log.Record]:
        """The sparse layers at the end; load and dropped are those of the last batch."""
        last = result.history[-1].get("layers", {})
        layers = {
            name: {"similarity": cosine, "load": log.load_ratio(last[name]), "dropped": last[name]["dropped"]}
            for name, cosine in measure.expert_cosines(result.model).items()
        }
        return [{"kind": "layers", "layers": layers}] if layers else []

    def _cost(self, result: TrainResult) -> log.Record:
        counts, pairs = count(result.model), result.steps * self.config.batch_size
        gflops = counts.image_gflops + counts.text_gflops
        return {
            "kind": "cost",
            "steps": result.steps,
            "pairs": pairs,
            "gflops_per_pair": gflops,
            "train_gflops": (1 + _BACKWARD) * gflops * pairs,
            "params": counts.params,
            "active_params": counts.active_params,
            "seconds": round(result.seconds, 1),
            "machine": describe_machine(self.device),
        }


@lru_cache(maxsize=1)
def _training_data(data: Path, fingerprint: str, model: str, batch_size: int, seed: int) -> Any:
    """The data in the order of a seed, read once for consecutive runs of one seed."""
    _, _, preprocess = _create(model, load_weights=False)
    tokenizer = _tokenizer(fixed_texts.read(data), model)
    return train_loader(data, preprocess, tokenizer, batch_size, workers=0, seed=seed, cache=True)


def _tokenizer(fixed: tuple[Any, Any] | None, model: str) -> Any:
    """That of the data's fixed texts, or of the model."""
    return tokenizers.get_tokenizer(model) if fixed is None else fixed[1]


def _model(runs_directory: str | Path, name: str) -> Path:
    return Path(runs_directory) / name / "model"


def _create(model: str, **options: Any) -> tuple[nn.Module, Any, Any]:
    with factory.expecting_random_weights():
        return factory.create_model_and_transforms(model, output_dict=True, **options)
