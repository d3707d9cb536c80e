"""``clipup eval``: retrieval and zero-shot classification."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..data.formats import idle_options, name_of_format
from ..data.options import SourceOptions
from ..models import known_models
from ..option_group import option
from ..precision import token_dtype
from ..progress import printable
from .flags import EncodingOptions, parse
from .logs import errors_only
from .outputs import check_file, write_text

if TYPE_CHECKING:
    from ..evaluate.datasets import DataSet


_RETRIEVAL = ("coco", "flickr30k", "csv", "webdataset")
_CLASSIFICATION = ("imagenet", "imagenet-v2", "webdataset")  # the task of a webdataset is only known from its files
_WITH_ANNOTATIONS = ("coco", "flickr30k")
_NAMED_BY_ROOT = ("imagenet-v2", "webdataset", "csv")  # --root decides what is measured, so results name it
_DATASET = {"with --dataset": lambda group: group.dataset is not None}
_NO_DATASET = {"without --dataset": lambda group: group.dataset is None}
_NO_RETRIEVAL = {
    "without data for retrieval (--val-data)": lambda group: group.val_data is None and group.dataset not in _RETRIEVAL
}
_NO_CLASSES = {
    "without classes (--classes and --images)": lambda group: (
        group.classes is None and group.dataset not in _CLASSIFICATION
    )
}


@dataclass(kw_only=True)
class Options(EncodingOptions):
    """Measures retrieval and zero-shot classification of a dense or sparse model on a benchmark (--dataset and --root),
    or on your own data (--val-data; --classes and --images). docs/evaluation.md shows the layouts on disk.

    Example: clipup eval logs/b16-moe/model --dataset coco --root /data/coco --out coco.json
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model name of open_clip, the directory of a model or of a training run, or hf-hub:ORG/NAME. A run stands for
    its model or, while it goes on, for its newest checkpoint."""
    pretrained: str | None = None
    """Tag, file of weights, or directory of a model or a finished run, for a model given by name; a training checkpoint
    may be sparse."""
    random_weights: bool = option(
        False,
        idle={
            "on a model that brings its weights": lambda group: known_models.has_weights(group.model, group.pretrained)
        },
    )
    """Measure a model given by name with random, untrained weights."""
    dataset: Literal["coco", "flickr30k", "imagenet", "imagenet-v2", "webdataset", "csv"] | None = None
    """Benchmark. coco, flickr30k: retrieval on Karpathy's splits; imagenet, imagenet-v2: classification; webdataset:
    as given in its directory; csv: retrieval."""
    root: str | None = None
    """Directory of the benchmark; for webdataset also a shard pattern, for csv also the file."""
    split: str = option(
        "test",
        idle=_NO_DATASET
        | {"on imagenet-v2, or on files named by --root, which are one split": lambda group: group.is_one_split},
    )
    """Split of the benchmark."""
    annotations: Path | None = option(
        None, idle={"without --dataset coco or flickr30k": lambda group: group.dataset not in _WITH_ANNOTATIONS}
    )
    """coco, flickr30k: the caption file. None: the one in root with CLIP_benchmark's or Karpathy's name."""
    captions_per_image: int | None = option(None, least=1, idle=_NO_RETRIEVAL | _NO_DATASET)
    """Benchmarks: use only the first n captions per image. None: all, as in CLIP_benchmark (five, on COCO sometimes
    more)."""
    val_data: str | None = option(None, idle=_DATASET)
    """Retrieval: WebDataset shards or a CSV file. An image may have several captions: one a line of the .txt, captions
    in the .json, in a CSV file several rows."""
    by: str = option("group", idle=_NO_RETRIEVAL)
    """Retrieval: metadata key; images with the same value are also measured separately."""
    multi_positive: bool = option(False, idle=_NO_RETRIEVAL)
    """Retrieval: treat equal captions as one text that matches every image with this caption."""
    source: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)
    classes: Path | None = option(None, idle=_DATASET)
    """Classification: text file with one class name per line."""
    images: str | None = option(None, idle=_DATASET)
    """Classification: directory with a subdirectory per class, or shards with .cls files."""
    templates: Path | None = option(None, idle=_NO_CLASSES)
    """Classification: text file with one prompt per line, {} for the class name. None: the benchmark's prompts
    (imagenet: open_clip's 80), or open_clip's seven short ones with --classes."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["--json"])] = None
    """File for the results as JSON; "-" prints only JSON."""
    card: bool = False
    """Add the results to the model card (README.md) in the model's directory."""

    @property
    def is_one_split(self) -> bool:
        """Whether there is nothing to choose a split from."""
        root = Path(self.root or "")
        of_files = self.dataset in ("webdataset", "csv") and (root.is_file() or ".tar" in str(root))
        return self.dataset == "imagenet-v2" or of_files

    def idle(self) -> dict[str, str]:
        of_val_data = {"dataset_type": "without --val-data", "max_skipped": "without --val-data: nothing is skipped"}
        others = idle_options(self.dataset, name_of_format(self.val_data, self.source.dataset_type))
        return super().idle() | (of_val_data if self.val_data is None else {}) | others

    def check(self) -> None:
        """
        Raises:
            ValueError: an option has a value that is refused, or two contradict each other.
        """
        super().check()
        if self.dataset is None and self.val_data is None and self.classes is None:
            raise ValueError("nothing to measure: pass --dataset and --root, --val-data, or --classes and --images")
        if (self.dataset is None) != (self.root is None):
            raise ValueError("a benchmark needs both --dataset and --root")
        if (self.classes is None) != (self.images is None):
            raise ValueError("classification needs both --classes and --images")


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup eval")
    if options.out is not None and options.out != "-":
        check_file("out", options.out)
    from ..models import factory, model_card, model_names
    from .runs import model_directory

    options.model, options.pretrained = factory.name_and_weights(options.model, options.pretrained)
    directory = model_directory(options.model)
    if options.card and directory is None:
        raise ValueError(f"card: {options.model} is no model's directory or finished run, so it has no card to add to")
    if not options.random_weights:
        model_names.refuse_random_weights(
            "pretrained", options.model, options.pretrained, "or --random-weights to measure random weights"
        )
    results = evaluate(options)
    text = json.dumps(results, indent=2)
    print(text if options.out == "-" else table(results))
    if options.out is not None and options.out != "-":
        write_text(Path(options.out), f"{text}\n")
    if options.card and directory is not None:
        model_card.add_results(directory, results)
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """The requested results, ``retrieval`` and ``zero_shot``, and what was measured: model, dataset, split."""
    from clipup_kernels.self_check import check_once

    from ..data.loaders import load_eval_samples
    from ..evaluate.datasets import ClassificationSet, RetrievalSet
    from ..evaluate.retrieval import evaluate_retrieval
    from ..evaluate.zero_shot import zero_shot
    from ..inference.prepared import quantization
    from .runs import load_for_inference

    if options.device.startswith("cuda"):
        check_once(options.device, [token_dtype(options.precision)])
    data_set = _benchmark(options)
    samples = None
    if options.val_data is not None:  # found before the model is loaded, which brings the transform
        samples = load_eval_samples(options.val_data, None, options.source, "val_data")
    model, preprocess, tokenizer = load_for_inference(
        options.model, options.pretrained, options.precision, options.int8, options.device
    )
    int8 = quantization(model) is not None
    common: dict[str, Any] = {"batch_size": options.batch_size, "precision": options.precision, "show_progress": True}
    paths = {"annotations": options.annotations, "classes": options.classes, "templates": options.templates}
    measured = {
        "model": options.model,
        "pretrained": options.pretrained,
        "random_weights": options.random_weights or None,
        "precision": f"{options.precision}, int8 weights" if int8 else options.precision,
        "dataset": options.dataset,
        "root": options.root if options.dataset in _NAMED_BY_ROOT else None,
        "split": None if options.dataset is None or options.is_one_split else options.split,
        "captions_per_image": options.captions_per_image,
        "val_data": options.val_data,
        "images": options.images,
        **{name: None if path is None else str(path) for name, path in paths.items()},
    }
    results: dict[str, Any] = {name: value for name, value in measured.items() if value is not None}
    if isinstance(data_set, RetrievalSet):
        samples = data_set.samples(preprocess, options.source.max_image_pixels)
    if samples is not None:
        samples.preprocess = preprocess
        samples.read_at_once, samples.workers = options.batch_size, options.workers
        recall = evaluate_retrieval(
            model, samples, tokenizer, by=options.by, multi_positive=options.multi_positive, **common
        )
        assert recall is not None  # this is the only process
        if options.by != Options.by and "splits" not in recall:
            print(f"clipup eval: no image has the metadata key of --by, {options.by!r}", file=sys.stderr)
        results |= {"retrieval": {**recall, "skipped": samples.skipped}, "multi_positive": options.multi_positive}
        if samples.skipped:
            print(
                printable(f"clipup eval: skipped {samples.skipped} unreadable, such as {samples.skips.first}"),
                file=sys.stderr,
            )
    if isinstance(data_set, ClassificationSet):
        images = data_set.samples(preprocess, options.batch_size, options.workers, options.source.max_image_pixels)
        results["zero_shot"] = zero_shot(model, images, data_set.classes, tokenizer, None, data_set.templates, **common)
    return results


def _benchmark(options: Options) -> DataSet | None:
    """The benchmark or the labelled images; None with ``val_data`` alone."""
    from ..data.image_files import passed_over
    from ..evaluate import datasets, image_folder, read_lines
    from ..evaluate.labelled_images import KINDS
    from ..evaluate.zero_shot import TEMPLATES

    templates = [] if options.templates is None else read_lines(options.templates)
    data_set: DataSet
    if options.classes is not None and options.images is not None:
        names = read_lines(options.classes)
        images = options.images.split("::") if options.images.endswith(".tar") else image_folder(options.images, names)
        data_set = datasets.ClassificationSet(images, names, TEMPLATES)
        if isinstance(images[0], tuple):  # names, numbers or the order may have decided
            pairs = [f"{path.relative_to(options.images).parts[0]} is {names[label]!r}" for path, label in images]
            print(printable(f"clipup eval: in --images, {pairs[0]}, ..., {pairs[-1]}"), file=sys.stderr)
            if others := passed_over(options.images, KINDS):
                print(f"clipup eval: passed over {others}", file=sys.stderr)
    elif options.root is not None:
        root, split = options.root, options.split
        readers: dict[str | None, Callable[[], DataSet]] = {
            "coco": lambda: datasets.coco(root, split, options.annotations),
            "flickr30k": lambda: datasets.flickr30k(root, split, options.annotations),
            "imagenet": lambda: datasets.imagenet(root, split),
            "imagenet-v2": lambda: datasets.imagenet_v2(root),
            "webdataset": lambda: datasets.webdataset(root, split, templates),
            "csv": lambda: datasets.csv(root, split, options.source),
        }
        data_set = readers[options.dataset]()
    else:
        return None
    if isinstance(data_set, datasets.ClassificationSet):
        return replace(data_set, templates=templates or data_set.templates)
    kept = slice(options.captions_per_image)
    return replace(data_set, records=[replace(record, captions=record.captions[kept]) for record in data_set.records])


def table(results: dict[str, Any]) -> str:
    """The results as a text table, in percent."""
    from ..evaluate.retrieval import RECALL_AT, WAYS

    lines = []
    if "retrieval" in results:
        recall = results["retrieval"]
        heads = "".join(f"{f'R@{k}':>10}" for k in RECALL_AT)
        lines.append(f"{'retrieval (%)':<16}{'images':>8}  {'':<13}{heads}{'chance':>10}")
        for name, row in {"all": recall, **recall.get("splits", {})}.items():
            for way in WAYS:
                cells = "".join(f"{100 * row[f'{way}_R@{k}']:>10.2f}" for k in RECALL_AT)
                lines.append(f"{printable(name):<16}{row['gallery']:>8}  {way}{cells}{100 * row['chance_R@1']:>10.2f}")
    if "zero_shot" in results:
        row = results["zero_shot"]
        lines.append(f"{'zero-shot (%)':<16}{'images':>8}{'top-1':>10}{'top-5':>10}{'chance':>9}")
        cells = f"{100 * row['top1']:>10.2f}{100 * row['top5']:>10.2f}{100 * row['chance']:>9.2f}"
        lines.append(f"{row['classes']:>4} {'classes':<11}{row['images']:>8}{cells}")
    return "\n".join(lines)
