"""Runs the demonstration: data, dense model, upcycling, continued training of both, report."""

from __future__ import annotations

import json
from dataclasses import asdict
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

ARMS = ("dense_continued", "clip_up")


def run(options: DemoOptions) -> dict[str, Any]:
    """Runs the demonstration and returns the content of ``report.json``.

    Raises:
        FileExistsError: OUT holds an earlier demonstration and ``overwrite`` is not set.
        ImportError: the packages of the data set are missing.
    """
    out = Path(options.out)
    held = [name for name in ("report.json", "report.html", *ARMS) if (out / name).exists()]
    if held and not options.overwrite:
        raise FileExistsError(
            f"{out} holds an earlier demonstration ({', '.join(held)}); pass --overwrite to replace it, or "
            "another --out"
        )
    _say("1/5", "pictograms and their names, rendered from Python packages")
    data = Path(options.data or out / "data")
    dataset = describe(data) if options.data else build(data, overwrite=options.overwrite)

    _say("2/5", f"the dense CLIP in {options.start}")
    torch.manual_seed(options.seed)
    model, _, preprocess = factory.create_model_and_transforms(options.start, output_dict=True)
    tokenizer = tokenizers.get_tokenizer(options.start)
    stages = _Stages(options, data, preprocess, tokenizer)
    arms = {"dense": stages.measure(model)}

    _say("3/5", "upcycling: every other MLP becomes 8 experts behind a router")
    config = MoEConfig.clip_up()
    sparse = upcycle(model, config)
    difference = step0_difference(model, sparse)
    print(f"      largest difference of any feature, before the first step: {difference:.1e}")
    arms["upcycled_step0"] = {**stages.measure(sparse), "max_feature_difference": difference}

    _say("4/5", f"the dense baseline continues training for {options.continue_steps} steps")
    dense_continued = stages.train(model, "dense_continued")
    arms["dense_continued"] = stages.measure(model, dense_continued)

    _say("5/5", f"the sparse model continues training for the same {options.continue_steps} steps")
    clip_up = stages.train(sparse, "clip_up")
    arms["clip_up"] = stages.measure(sparse, clip_up)

    splits = dataset["splits"]
    report = {
        "data": {
            "name": dataset["name"],
            "train_pairs": splits["train"]["images"],
            "test_images": splits["test"]["images"],
            "test_captions": splits["test"]["captions"],
        },
        "chance_R@1": arms["dense"]["chance_R@1"],
        **arms,
        "options": asdict(options),
        "moe_cfg": config.to_dict(),
        "model": options.start,
        "machine": describe_machine(),
    }
    results = dict(zip(ARMS, (dense_continued, clip_up), strict=True))
    page = render_demo(
        report,
        curves={arm: result.history for arm, result in results.items()},
        evaluations={arm: result.evaluations for arm, result in results.items()},
        routing=routing_examples(sparse, stages.test, stages.pictures),
        retrievals=retrieval_examples(sparse, stages.test, stages.pictures, tokenizer),
        dataset=dataset,
    )
    replace_files(
        {
            out / "report.json": lambda path: path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8"),
            out / "report.html": lambda path: path.write_text(page, encoding="utf-8"),
        }
    )
    return report


class _Stages:
    """Training and measuring models on data that is read once."""

    def __init__(self, options: DemoOptions, data: Path, preprocess: Any, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.loader = train_loader(
            data, preprocess, tokenizer, options.batch_size, workers=0, seed=options.seed, cache=True
        )
        self.test: list[Sample] = list(eval_samples(data / "test-*.tar", preprocess))
        self.concepts: list[Sample] = list(eval_samples(data / "concepts-*.tar", preprocess))
        self.pictures = [to_pil_image(picture) for picture, _, _ in eval_samples(data / "test-*.tar", pil_to_tensor)]

    def train(self, model: nn.Module, name: str) -> TrainResult:
        options = TrainOptions.flat(
            model=self.options.start,
            logs=self.options.out,
            name=name,
            force=self.options.overwrite,
            steps=self.options.continue_steps,
            lr=self.options.continue_lr,
            wd=0.1,
            grad_clip_norm=1.0,
            batch_size=self.options.batch_size,
            precision="fp32",
            device="cpu",
            seed=self.options.seed,
            save_frequency=0,
        )
        curve = Every(self.options.eval_every, lambda model: self._retrieval(model, self.test))
        return train(options, model=model, loader=self.loader, callbacks=[curve])

    def _retrieval(self, model: nn.Module, samples: list[Sample], by: str | None = None) -> dict[str, Any]:
        recall = evaluate_retrieval(model, samples, self.tokenizer, batch_size=256, by=by)
        assert recall is not None  # this is the only process
        return recall

    def measure(self, model: nn.Module, result: TrainResult | None = None) -> dict[str, Any]:
        """An arm's entry in the report."""
        counts = count(model)
        test = self._retrieval(model, self.test, by="group")
        return {
            "steps": result.steps if result else 0,
            "seconds": round(result.seconds, 2) if result else 0.0,
            "params": counts.params,
            "active_params": counts.active_params,
            "gflops_per_pair": counts.image_gflops + counts.text_gflops,
            **test,
            "splits": {**test["splits"], "concepts": self._retrieval(model, self.concepts)},
        }


def _say(stage: str, what: str) -> None:
    print(f"\n[{stage}] {what}", flush=True)
