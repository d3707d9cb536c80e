"""``clipup eval``: retrieval and zero-shot classification."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from .. import models
from ..checkpoint import replace_files
from ..evaluate.precision import Precision, default_device, default_workers
from ..evaluate.retrieval import RECALL_AT, evaluate_retrieval
from ..evaluate.zero_shot import TEMPLATES, image_folder, image_shards, open_images, read_lines, zero_shot


@dataclass
class Options:
    """Measures retrieval (--val-data) and zero-shot classification (--classes and --images) of a dense or sparse model.

    Example: clipup eval runs/b16-moe/model --val-data 'data/test-{000..009}.tar' --json results.json
    """

    model: tyro.conf.Positional[str]
    """A model that open_clip knows, or a directory."""
    pretrained: str | None = None
    """Tag or file of open_clip weights for a model known by name. None: random weights."""
    val_data: str | None = None
    """Retrieval: WebDataset shards or a CSV file; an image may have several captions."""
    by: str = "group"
    """Retrieval: key of the samples' metadata whose values are also measured apart, where there is such a key."""
    multi_positive: bool = False
    """Retrieval: equal captions are one text, and every image that it stands beside is a right answer to it."""
    dataset_type: Literal["webdataset", "csv", "auto"] = "auto"
    """What val_data is; auto goes by its ending."""
    csv_separator: str = "\t"
    """Separates the columns of a CSV file."""
    csv_img_key: str = "filepath"
    """Column with the paths of the images; rows of one image are its captions."""
    csv_caption_key: str = "title"
    """Column with the captions."""
    workers: int = field(default_factory=default_workers)
    """Retrieval: processes that read images."""
    classes: Path | None = None
    """Classification: text file with one class name a line."""
    images: str | None = None
    """Classification: directory with a subdirectory for every class, or shards with .cls files."""
    templates: Path | None = None
    """Classification: text file with one prompt a line, {} for the class name. None: open_clip's seven short ones."""
    batch_size: int = 64
    """Images, or texts, in a batch."""
    precision: Precision = "fp32"
    """fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (the model itself)."""
    device: str = field(default_factory=default_device)
    """cpu, cuda or cuda:N."""
    json: str | None = None
    """File for the results as JSON; "-" prints JSON alone."""

    def __post_init__(self) -> None:
        if self.val_data is None and self.classes is None:
            raise ValueError("there is nothing to measure: pass --val-data, or --classes and --images")
        if (self.classes is None) != (self.images is None):
            raise ValueError("classification needs both --classes and --images")


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, args=argv, prog="clipup eval")
    logging.getLogger().setLevel(logging.ERROR)
    results = evaluate(options)
    text = json.dumps(results, indent=2) + "\n"
    if options.json == "-":
        print(text, end="")
        return 0
    print(table(results))
    if options.json is not None:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        replace_files({Path(options.json): lambda path: path.write_text(text, encoding="utf-8")})
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """``retrieval`` and ``zero_shot``, those that were asked for."""
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {options.device!r}, but torch finds no CUDA GPU; use --device cpu")
    names = None if options.classes is None else read_lines(options.classes)
    labelled = None if names is None else _labelled_images(options.images, names)
    model, _, preprocess = models.create_model_and_transforms(
        options.model, options.pretrained, precision=options.precision, device=options.device
    )
    tokenizer = models.get_tokenizer(options.model)
    common = {"batch_size": options.batch_size, "precision": options.precision, "show_progress": True}
    results: dict[str, Any] = {"model": options.model}
    if options.val_data is not None:
        from ..data.loaders import eval_samples

        samples = eval_samples(
            options.val_data,
            preprocess,
            dataset_type=options.dataset_type,
            csv_separator=options.csv_separator,
            csv_img_key=options.csv_img_key,
            csv_caption_key=options.csv_caption_key,
        )
        triples = _one_by_one(samples.batches(options.batch_size, options.workers))
        found = evaluate_retrieval(
            model, triples, tokenizer, by=options.by, multi_positive=options.multi_positive, **common
        )
        results["retrieval"] = {**found, "skipped": samples.skipped}
    if names is not None:
        templates = TEMPLATES if options.templates is None else read_lines(options.templates)
        results["zero_shot"] = zero_shot(model, labelled, names, tokenizer, preprocess, templates, **common)
    return results


def _one_by_one(batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The samples of batches that other processes have read."""
    for batch in batches:
        yield from zip(*batch, strict=True)


def _labelled_images(images: str, classes: list[str]) -> Any:
    return image_shards(images) if images.endswith(".tar") else open_images(image_folder(images, classes))


def table(results: dict[str, Any]) -> str:
    """The results as text, in percent."""
    lines = []
    if "retrieval" in results:
        found = results["retrieval"]
        heads = [f"{way} R@{k}" for way in ("t2i", "i2t") for k in RECALL_AT]
        cells = "".join(f"{head:>10}" for head in heads)
        lines.append(f"{'retrieval (%)':<16}{'images':>8}{cells}{'chance':>9}")
        for name, row in {"all": found, **found.get("splits", {})}.items():
            values = [row[way][f"r{k}"] for way in ("t2i", "i2t") for k in RECALL_AT]
            cells = "".join(f"{100 * value:>10.2f}" for value in values)
            lines.append(f"{name:<16}{row['gallery']:>8}{cells}{100 * row['chance_r1']:>9.2f}")
    if "zero_shot" in results:
        row = results["zero_shot"]
        lines.append(f"{'zero-shot (%)':<16}{'images':>8}{'top-1':>10}{'top-5':>10}{'chance':>9}")
        cells = f"{100 * row['top1']:>10.2f}{100 * row['top5']:>10.2f}{100 * row['chance']:>9.2f}"
        lines.append(f"{row['classes']:>4} {'classes':<11}{row['images']:>8}{cells}")
    return "\n".join(lines)
