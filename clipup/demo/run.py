"""Runs the demonstration: data, dense model, upcycling, continued training of both, report."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clipup_kernels.machine import describe_machine

from ..atomic_files import replace_files
from ..clip.flops import count
from ..data.loaders import describe, eval_samples, train_loader
from ..evaluate.retrieval import evaluate_retrieval
from ..models import factory, tokenizers
from ..moe.config import MoEConfig
from ..train import Every, TrainOptions, TrainResult, train
from ..upcycling.step0 import step0_difference
from ..upcycling.upcycle import upcycle
from .examples import Sample, retrieval_examples, routing_examples
from .options import DemoOptions
from .page import render_demo
from .pictograms.build import build

ARMS = ("dense", "dense_continued", "clip_up")
REPORT_FILES = ("report.json", "report.html")
_TRAIN_RULE = "all other drawings; several captions per image, one of which is drawn at each step"


def run(options: DemoOptions) -> dict[str, Any]:
    """Runs the demonstration and returns the content of ``report.json``.

    Raises:
        FileExistsError: OUT holds an earlier demonstration and ``overwrite`` is not set.
        ImportError: the packages of the data set are missing.
    """
    out = Path(options.out)
    _refuse_earlier(out, options.overwrite)
    _say("1/5", "pictograms and their names, rendered from Python packages")
    data = Path(options.data or out / "data")
    dataset = describe(data) if options.data else build(data)

    torch.manual_seed(options.seed)
    with factory.expecting_random_weights():
        model, _, preprocess = factory.create_model_and_transforms(
            options.model, load_weights=options.start is not None, output_dict=True
        )
    tokenizer = tokenizers.get_tokenizer(options.model)
    stages = _Stages(options, out, data, preprocess, tokenizer)

    origin = f"from {options.start}" if options.start else "from random weights"
    _say("2/5", f"a dense CLIP {origin}, {options.steps_before} steps")
    dense = stages.train(model, "dense", options.steps_before, options.lr) if options.steps_before else None
    report: dict[str, Any] = {"data": _about(dataset), "chance_R@1": None, "dense": stages.measure(model, dense)}

    _say("3/5", "upcycling: every other MLP becomes 8 experts behind a router")
    config = MoEConfig.clip_up()
    sparse = upcycle(model, config)
    difference = step0_difference(model, sparse)
    print(f"      largest difference of any feature, before the first step: {difference:.1e}")
    report["upcycled_step0"] = {**stages.measure(sparse), "max_feature_difference": difference}

    _say("4/5", f"the dense baseline continues training for {options.continue_steps} steps")
    continued = copy.deepcopy(model)
    dense_continued = stages.train(continued, "dense_continued", options.continue_steps, options.continue_lr)
    report["dense_continued"] = stages.measure(continued, dense_continued)

    _say("5/5", f"the sparse model continues training for the same {options.continue_steps} steps")
    clip_up = stages.train(sparse, "clip_up", options.continue_steps, options.continue_lr)
    report["clip_up"] = stages.measure(sparse, clip_up)
    report["chance_R@1"] = report["dense"]["chance_R@1"]
    report |= {
        "options": asdict(options),
        "moe_cfg": config.to_dict(),
        "model": options.model,
        "machine": describe_machine(),
    }

    results = {arm: result for arm, result in zip(ARMS, (dense, dense_continued, clip_up), strict=True) if result}
    page = render_demo(
        report,
        curves={arm: _on_one_axis(arm, result.history, options) for arm, result in results.items()},
        evaluations={arm: _on_one_axis(arm, result.evaluations, options) for arm, result in results.items()},
        loads=_loads(_on_one_axis("clip_up", clip_up.history, options)),
        routing=routing_examples(sparse, stages.test, stages.pictures),
        retrievals=retrieval_examples(sparse, stages.test, stages.pictures, tokenizer),
        data_notes=_data_notes(dataset),
    )
    files = zip(REPORT_FILES, (json.dumps(report, indent=2) + "\n", page), strict=True)
    replace_files({out / name: partial(_write, text) for name, text in files})
    return report


class _Stages:
    """Training and measuring models on data that is read once."""

    def __init__(self, options: DemoOptions, out: Path, data: Path, preprocess: Any, tokenizer: Any) -> None:
        self.options, self.out, self.tokenizer = options, out, tokenizer
        self.loader = train_loader(
            data, preprocess, tokenizer, options.batch_size, workers=0, seed=options.seed, cache=True
        )
        self.test: list[Sample] = list(eval_samples(data / "test-*.tar", preprocess))
        self.concepts: list[Sample] = list(eval_samples(data / "concepts-*.tar", preprocess))
        self.pictures = [to_pil_image(picture) for picture, _, _ in eval_samples(data / "test-*.tar", pil_to_tensor)]

    def train(self, model: nn.Module, name: str, steps: int, lr: float) -> TrainResult:
        options = TrainOptions(
            model=self.options.model,
            logs=str(self.out),
            name=name,
            force=self.options.overwrite,
            steps=steps,
            lr=lr,
            wd=0.1,
            grad_clip_norm=1.0,
            batch_size=self.options.batch_size,
            precision="fp32",
            device="cpu",
            seed=self.options.seed,
            save_frequency=0,
        )
        curve = Every(self.options.eval_every, self._recall)
        return train(options, model=model, loader=self.loader, callbacks=[curve])

    def _recall(self, model: nn.Module) -> dict[str, float]:
        recall = self._retrieval(model, self.test)
        return {name: recall[name] for name in ("text_to_image_R@1", "image_to_text_R@1")}

    def _retrieval(self, model: nn.Module, samples: list[Sample], by: str | None = None) -> dict[str, Any]:
        found = evaluate_retrieval(model, samples, self.tokenizer, batch_size=256, by=by)
        assert found is not None  # this is the only process
        return found

    def measure(self, model: nn.Module, result: TrainResult | None = None) -> dict[str, Any]:
        """An arm's entry in the report."""
        counts = count(model)
        test = self._retrieval(model, self.test, by="group")
        concepts = self._retrieval(model, self.concepts)
        splits = {**test.pop("splits"), "concepts": concepts}
        return {
            "steps": result.steps if result else 0,
            "seconds": round(result.seconds, 2) if result else 0.0,
            "params": counts.params,
            "active_params": counts.active_params,
            "gflops_per_pair": counts.image_gflops + counts.text_gflops,
            **test,
            "splits": splits,
        }


def _refuse_earlier(out: Path, overwrite: bool) -> None:
    held = [name for name in (*REPORT_FILES, *ARMS) if (out / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"{out} holds an earlier demonstration ({', '.join(held)}); pass --overwrite to replace it, or "
            "another --out"
        )


def _on_one_axis(arm: str, records: list[dict[str, Any]], options: DemoOptions) -> list[dict[str, Any]]:
    """Records with steps counted from the dense model's first; continued training starts where it ended."""
    before = 0 if arm == "dense" else options.steps_before
    return [{**record, "step": record["step"] + before} for record in records]


def _loads(history: list[dict[str, Any]]) -> dict[str, dict[str, list]]:
    """{layer: {"steps": [...], "load": [[share of every expert], ...]}}"""
    steps = [record["step"] for record in history]
    return {
        layer: {"steps": steps, "load": [record["layers"][layer]["load"] for record in history]}
        for layer in history[0]["layers"]
    }


def _about(dataset: dict[str, Any]) -> dict[str, Any]:
    splits = dataset["splits"]
    return {
        "name": dataset["name"],
        "train_pairs": splits["train"]["images"],
        "test_images": splits["test"]["images"],
        "test_captions": splits["test"]["captions"],
    }


def _data_notes(dataset: dict[str, Any]) -> dict[str, Any]:
    splits = {
        name: {
            "images": split["images"],
            "captions": split["captions"],
            "rule": dataset["rules"].get(name, _TRAIN_RULE),
        }
        for name, split in dataset["splits"].items()
    }
    licences = [
        {"name": source["gives"], "licence": source["licence"], "artist": source["made_by"], "url": source["url"]}
        for source in dataset["sources"]
    ]
    return {"splits": splits, "licences": licences, "left_out": dataset["rules"]["left_out"]}


def _say(stage: str, what: str) -> None:
    print(f"\n[{stage}] {what}", flush=True)


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
