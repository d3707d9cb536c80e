"""``clipup eval``: retrieval and zero-shot classification."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..atomic_files import replace_files
from ..clip.accelerate import for_inference
from ..data.images import MAX_PIXELS
from ..data.loaders import EvalSamples, eval_samples
from ..data.skips import MAX_SKIPPED
from ..evaluate import datasets
from ..evaluate.datasets import image_folder, read_lines
from ..evaluate.retrieval import RECALL_AT, evaluate_retrieval
from ..evaluate.zero_shot import TEMPLATES, zero_shot
from ..precision import Precision, check_device, default_device, default_workers
from ..pretrained import factory, model_card, model_names, origin, tokenizers
from .flags import NoEffect, is_csv, parse
from .outputs import check_file


@dataclass
class Options:
    """Measures retrieval and zero-shot classification of a dense or sparse model on a benchmark (--dataset and --root),
    or on data of one's own (--val-data; --classes and --images). docs/evaluation.md shows how they lie on disk.

    Example: clipup eval runs/b16-moe/model --dataset coco --root /data/coco --out coco.json
    """

    model: tyro.conf.Positional[str]
    """A model that open_clip knows, a directory, or hf-hub:ORG/NAME."""
    pretrained: str | None = None
    """Tag or file of weights for a model known by name; a training checkpoint may be sparse."""
    random_weights: bool = False
    """Measure a model known by name with random weights, which nothing has trained."""
    dataset: Literal["coco", "flickr30k", "imagenet", "webdataset", "csv"] | None = None
    """A benchmark. coco, flickr30k: retrieval with Karpathy's splits; imagenet: classification; webdataset: what its
    directory says; csv: retrieval."""
    root: str | None = None
    """Where the benchmark lies: a directory; for webdataset and csv also the shards or the file themselves."""
    split: str = "test"
    """Split of the benchmark."""
    annotations: Path | None = None
    """coco, flickr30k: the file with the captions. None: the one in root, as CLIP_benchmark or Karpathy name it."""
    captions_per_image: int | None = None
    """Benchmarks: the first n captions of an image only. None: all, as CLIP_benchmark does: five, on COCO sometimes
    more."""
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
    max_skipped: float = MAX_SKIPPED
    """val_data: share of the samples that may be unreadable; they are left out and counted. In a benchmark none may."""
    max_image_pixels: int = MAX_PIXELS
    """Pixels of an image that is decoded at most; one of more counts as unreadable."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images."""
    classes: Path | None = None
    """Classification: text file with one class name a line."""
    images: str | None = None
    """Classification: directory with a subdirectory for every class, or shards with .cls files."""
    templates: Path | None = None
    """Classification: text file with one prompt a line, {} for the class name. None: the benchmark's own (imagenet:
    open_clip's 80), for --classes open_clip's seven short ones."""
    batch_size: int = 64
    """Images, or texts, in a batch."""
    precision: Precision = "fp32"
    """fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (the model itself)."""
    device: str = field(default_factory=default_device)
    """cpu, cuda or cuda:N."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["--json"])] = None
    """File for the results as JSON; "-" prints JSON alone."""
    card: bool = False
    """Write the numbers into the model card (README.md) of the model's directory."""

    def __post_init__(self) -> None:
        if self.dataset is None and self.val_data is None and self.classes is None:
            raise ValueError(
                "there is nothing to measure: pass --dataset and --root, --val-data, or --classes and --images"
            )
        if (self.dataset is None) != (self.root is None):
            raise ValueError("a benchmark needs both --dataset and --root")
        if self.dataset is not None and (self.val_data is not None or self.classes is not None):
            raise ValueError("--dataset names the data already; leave out --val-data, --classes and --images")
        if (self.classes is None) != (self.images is None):
            raise ValueError("classification needs both --classes and --images")
        for name in ("captions_per_image", "annotations"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is about a benchmark; pass --dataset and --root, or leave it out")
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(f"captions_per_image must be at least 1, got {self.captions_per_image}")


def _reads_csv(options: Options) -> bool:
    return options.dataset == "csv" or is_csv(options.val_data, options.dataset_type)


def _has_retrieval(options: Options) -> bool:
    """Whether retrieval may be measured; a benchmark in WebDataset says only on disk what it is for."""
    return options.val_data is not None or options.dataset not in (None, "imagenet")


def _has_classification(options: Options) -> bool:
    return options.classes is not None or options.dataset in ("imagenet", "webdataset")


RULES = [
    NoEffect(("split",), lambda options: options.dataset is None, "without --dataset"),
    NoEffect(
        ("annotations",),
        lambda options: options.dataset not in (None, "coco", "flickr30k"),
        "on another --dataset than coco and flickr30k",
    ),
    NoEffect(
        ("captions_per_image", "by", "multi_positive"),
        lambda options: not _has_retrieval(options),
        "without data for retrieval (--val-data)",
    ),
    NoEffect(
        ("templates",),
        lambda options: not _has_classification(options),
        "without classes (--classes and --images)",
    ),
    NoEffect(("dataset_type",), lambda options: options.val_data is None, "without --val-data"),
    NoEffect(
        ("csv_separator", "csv_img_key", "csv_caption_key"),
        lambda options: not _reads_csv(options),
        "on data that are no CSV file",
    ),
    NoEffect(
        ("random_weights",),
        lambda options: origin.has_weights(options.model, options.pretrained),
        "on a model that brings its weights",
    ),
]


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup eval", RULES)
    logging.getLogger().setLevel(logging.ERROR)
    if options.out not in (None, "-"):
        check_file("out", options.out)
    directory = model_names.directory_of(options.model)
    if options.card and directory is None:
        raise ValueError(f"card: {options.model} is no directory of this machine, so there is no card to write into")
    if not options.random_weights:
        origin.refuse_random_weights(
            "pretrained", options.model, options.pretrained, "or --random-weights, to measure them all the same"
        )
    results = evaluate(options)
    if options.card:
        model_card.add_results(directory, results)
    text = json.dumps(results, indent=2) + "\n"
    if options.out == "-":
        print(text, end="")
        return 0
    print(table(results))
    if options.out is not None:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        replace_files({Path(options.out): lambda path: path.write_text(text, encoding="utf-8")})
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """``retrieval`` and ``zero_shot``, those that were asked for, and what was measured: model, dataset, split."""
    check_device(options.device)
    found = _find(options)
    own = None if options.val_data is None else _own_samples(options)
    model, _, preprocess = factory.create_model_and_transforms(
        options.model, options.pretrained, precision=options.precision, device=options.device
    )
    model = for_inference(model, options.precision)
    tokenizer = tokenizers.get_tokenizer(options.model)
    common = {"batch_size": options.batch_size, "precision": options.precision, "show_progress": True}
    results: dict[str, Any] = {"model": options.model, "precision": options.precision}
    if options.dataset is not None:
        results |= {"dataset": options.dataset, "split": options.split}
    results |= {name: path for name in ("val_data", "images") if (path := getattr(options, name)) is not None}
    if own is not None:
        own.preprocess = preprocess
    retrieval = isinstance(found, datasets.RetrievalSet)
    samples = found.samples(preprocess, options.max_image_pixels) if retrieval else own
    if samples is not None:
        triples = _one_by_one(samples.batches(options.batch_size, options.workers))
        recall = evaluate_retrieval(
            model, triples, tokenizer, by=options.by, multi_positive=options.multi_positive, **common
        )
        results["retrieval"] = {**recall, "skipped": samples.skipped}
        results["multi_positive"] = options.multi_positive
    if isinstance(found, datasets.ClassificationSet):
        images = found.samples(preprocess, options.batch_size, options.workers, options.max_image_pixels)
        results["zero_shot"] = zero_shot(model, images, found.classes, tokenizer, None, found.templates, **common)
    return results


def _find(options: Options) -> datasets.DataSet | None:
    """The benchmark, or the labelled images; None where there is only ``val_data``."""
    templates = [] if options.templates is None else read_lines(options.templates)
    root, split = options.root, options.split
    if options.dataset == "coco":
        found = datasets.coco(root, split, options.annotations)
    elif options.dataset == "flickr30k":
        found = datasets.flickr30k(root, split, options.annotations)
    elif options.dataset == "imagenet":
        found = datasets.imagenet(root, split)
    elif options.dataset == "webdataset":
        found = datasets.webdataset(root, split, templates)
    elif options.dataset == "csv":
        columns = options.csv_separator, options.csv_img_key, options.csv_caption_key
        found = datasets.csv(root, split, *columns)
    elif options.classes is not None:
        names = read_lines(options.classes)
        images = options.images.split("::") if options.images.endswith(".tar") else image_folder(options.images, names)
        found = datasets.ClassificationSet(images, names, TEMPLATES)
    else:
        return None
    if isinstance(found, datasets.ClassificationSet):
        return datasets.ClassificationSet(found.images, found.classes, templates or found.templates)
    kept = slice(options.captions_per_image)
    return datasets.RetrievalSet([replace(record, captions=record.captions[kept]) for record in found.records])


def _own_samples(options: Options) -> EvalSamples:
    """Those of ``val_data``, which are looked for before a model is loaded; its transform is put in afterwards."""
    return eval_samples(
        options.val_data,
        preprocess=None,
        dataset_type=options.dataset_type,
        csv_separator=options.csv_separator,
        csv_img_key=options.csv_img_key,
        csv_caption_key=options.csv_caption_key,
        max_skipped=options.max_skipped,
        max_image_pixels=options.max_image_pixels,
        argument="val_data",
    )


def _one_by_one(batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The samples of batches that other processes have read."""
    for batch in batches:
        yield from zip(*batch, strict=True)


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
        if found.get("skipped"):
            lines.append(f"{found['skipped']} samples could not be read, and were skipped")
    if "zero_shot" in results:
        row = results["zero_shot"]
        lines.append(f"{'zero-shot (%)':<16}{'images':>8}{'top-1':>10}{'top-5':>10}{'chance':>9}")
        cells = f"{100 * row['top1']:>10.2f}{100 * row['top5']:>10.2f}{100 * row['chance']:>9.2f}"
        lines.append(f"{row['classes']:>4} {'classes':<11}{row['images']:>8}{cells}")
    return "\n".join(lines)
