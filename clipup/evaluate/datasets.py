"""Readers of benchmarks on disk: COCO and Flickr30k in Karpathy's splits, ImageNet, WebDataset, CSV.

The layouts are those of CLIP_benchmark, so one directory serves both; nothing is downloaded.

    COCO        ROOT/val2014/COCO_val2014_000000391895.jpg ...   ROOT/coco_test_karpathy.json
    Flickr30k   ROOT/1007129816.jpg ...                          ROOT/flickr30k_test_karpathy.txt
    ImageNet    ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG ...
    ImageNet-V2 ROOT/imagenetv2-matched-frequency-format-val/{0..999}/*.jpeg
    WebDataset  ROOT/test/{0..N-1}.tar, ROOT/test/nshards.txt, ROOT/dataset_type.txt (classification: also
                ROOT/classnames.txt and ROOT/zeroshot_classification_templates.txt)

Also read are Karpathy's own dataset_coco.json and dataset_flickr30k.json, data sets written by ``clipup data``, and
shards and CSV files by path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from .. import checks
from ..data.csv_files import CsvOptions, csv_samples, leaves
from ..data.evaluation import EvalSamples
from ..data.formats import FORMATS
from ..data.images import MAX_PIXELS
from ..data.samples import Sample
from ..data.shard_names import expand_shards, listed_shards, local_shards
from ..data.shard_writer import DATASET_FILE
from ..data.shards import tar_samples
from ..data.skips import Skips
from .labelled_images import image_folder, image_shards, labelled_images, read_lines

Template = Callable[[str], str] | str
"""A prompt: a function of the class name, or a string with the placeholder ``{}``."""

_ANNOTATIONS = "https://github.com/mehdidc/retrieval_annotations/releases"


@dataclass(frozen=True)
class RetrievalSet:
    """Images with their captions."""

    records: Sequence[Sample]

    def samples(self, preprocess: Callable[[Any], Tensor], max_image_pixels: int = MAX_PIXELS) -> EvalSamples:
        """The samples for ``evaluate_retrieval``. An unreadable or too large image raises ``ValueError``, naming it."""
        return EvalSamples(self.records, preprocess, Skips(), strict=True, max_image_pixels=max_image_pixels)


@dataclass(frozen=True)
class ClassificationSet:
    """Images with their classes: files with class indices, or shards with ``.cls`` members."""

    images: Sequence[tuple[Path, int]] | Sequence[str]
    classes: Sequence[str]
    templates: Sequence[Template]

    def samples(
        self,
        preprocess: Callable[[Any], Tensor],
        batch_size: int = 64,
        workers: int = 0,
        max_image_pixels: int = MAX_PIXELS,
    ) -> Iterator[tuple[Tensor, int]]:
        """The samples for ``zero_shot``, with files read by ``workers`` processes. An unreadable or too large image
        raises ``ValueError``, naming it."""
        shards = [image for image in self.images if isinstance(image, str)]
        if shards:
            return image_shards(shards, max_image_pixels, preprocess)
        files = [image for image in self.images if not isinstance(image, str)]
        return labelled_images(files, preprocess, batch_size, workers, max_image_pixels)


DataSet = RetrievalSet | ClassificationSet


def coco(root: str | Path, split: str = "test", annotations: str | Path | None = None) -> RetrievalSet:
    """COCO captions. All captions of an image are kept, as in CLIP_benchmark: mostly five, sometimes more.

    Args:
        root: directory with ``val2014`` (and ``train2014`` for the split train) and the annotations.
        split: Karpathy's test, val or train.
        annotations: a file in COCO's caption format or Karpathy's. None: coco_SPLIT_karpathy.json, else
            dataset_coco.json.

    Raises:
        FileNotFoundError, ValueError: a missing or unreadable file, by name, with where to get it.
    """
    root = Path(root)
    path = _annotations(root, annotations, f"coco_{split}_karpathy.json", "dataset_coco.json")
    content = checks.read_json(path, "annotations")
    with _format_of(path):
        if "annotations" in content:
            root /= "train2014" if split == "train" else "val2014"
            named = _coco_captions(content)
        else:
            named = _karpathy(content, path, split)
    return _retrieval(named, path, root)


def flickr30k(root: str | Path, split: str = "test", annotations: str | Path | None = None) -> RetrievalSet:
    """Flickr30k, five captions per image.

    Args:
        root: directory with the images, directly or in ``flickr30k-images``, and the annotations.
        split: Karpathy's test, val or train.
        annotations: a text file with a header and lines ``NAME.jpg,CAPTION``, or Karpathy's JSON. None:
            flickr30k_SPLIT_karpathy.txt, else dataset_flickr30k.json.

    Raises:
        FileNotFoundError, ValueError: as ``coco``.
    """
    root = Path(root)
    path = _annotations(root, annotations, f"flickr30k_{split}_karpathy.txt", "dataset_flickr30k.json")
    folder = root / "flickr30k-images" if (root / "flickr30k-images").is_dir() else root
    if path.suffix == ".json":
        with _format_of(path):
            named = _karpathy(checks.read_json(path, "annotations"), path, split)
        return _retrieval(named, path, folder)
    return _retrieval(_caption_lines(path), path, folder)


def imagenet(root: str | Path, split: str = "test") -> ClassificationSet:
    """ImageNet-1k with open_clip's class names and the 80 templates of OpenAI's CLIP.

    Args:
        root: directory with ``val``, which has one directory per class named by its WordNet id; or that directory.
        split: test or val (the same images), or train.

    Raises:
        FileNotFoundError, ValueError: no such split or directory, or not one directory for each of 1,000 classes.
    """
    checks.one_of("split", split, ("test", "val", "train"))
    name, other = ("train", "val") if split == "train" else ("val", "train")
    folder = Path(root) / name
    if not folder.is_dir() and Path(root).resolve().name != other:
        folder = Path(root)
    classes = open_clip.IMAGENET_CLASSNAMES
    return ClassificationSet(image_folder(folder, classes), classes, open_clip.OPENAI_IMAGENET_TEMPLATES)


def imagenet_v2(root: str | Path) -> ClassificationSet:
    """ImageNet-V2 (arXiv 1902.10811) with the class names and templates of ``imagenet``.

    Args:
        root: a variant's directory, as its archive unpacks it: one directory per class, named by the class index from
            0 to 999; or a directory that contains that directory alone.

    Raises:
        FileNotFoundError, ValueError: as ``image_folder``, or several variants.
    """
    variants = sorted(path for path in Path(root).glob("[iI]mage[nN]et[vV]2*") if path.is_dir())
    if len(variants) > 1:
        names = ", ".join(variant.name for variant in variants)
        raise ValueError(f"{root} has several variants of ImageNet-V2, {names}; name one of them")
    classes = open_clip.IMAGENET_CLASSNAMES
    images = image_folder([*variants, root][0], classes)
    return ClassificationSet(images, classes, open_clip.OPENAI_IMAGENET_TEMPLATES)


def webdataset(root: str | Path, split: str = "test", templates: Sequence[Template] = ()) -> DataSet:
    """Shards: a directory of CLIP_benchmark, one written by ``clipup data``, or a shard pattern (retrieval).

    Args:
        templates: prompts for classification, instead of those beside the shards.

    Returns:
        A ``RetrievalSet``, or a ``ClassificationSet`` unless CLIP_benchmark's ``dataset_type.txt`` says retrieval.

    Raises:
        FileNotFoundError, ValueError: no shards, a missing or empty shard, or no class names or templates.
    """
    directory = Path(root)
    count = directory / split / "nshards.txt"
    if count.is_file():
        numbers = range(int(count.read_text("utf-8")))
        shards = local_shards((directory / split / f"{number}.tar" for number in numbers), "root")
        kind = directory / "dataset_type.txt"
        if not kind.is_file() or kind.read_text().strip().lower() != "retrieval":
            return _classified(directory, shards, templates)
    elif (directory / DATASET_FILE).is_file():
        shards = listed_shards(directory, split, "root")
    elif directory.is_dir():
        raise FileNotFoundError(f"split: there is no {count}, and no {DATASET_FILE} in {root}")
    else:
        shards = expand_shards(str(root), "root")
    skips = Skips()
    return _nothing_skipped(tar_samples(shards, skips, "root"), skips, root)


def csv(root: str | Path, split: str, options: CsvOptions) -> RetrievalSet:
    """A CSV file with one row per caption; rows of one image are its captions.

    Args:
        root: the file, or a directory with SPLIT.csv or SPLIT.tsv, in which image paths are relative to the directory.

    Raises:
        FileNotFoundError, ValueError: no such file, no such column, or rows without image or caption.
    """
    path, directory = Path(root), Path(root) if Path(root).is_dir() else None
    if directory is not None:
        named = [directory / f"{split}{extension}" for extension in FORMATS["csv"].endings]
        path = next(filter(Path.is_file, named), named[0])
    skips = Skips()
    records = csv_samples(str(path), options, skips, "root", directory)
    return _nothing_skipped(records, skips, path)


def _annotations(root: Path, given: str | Path | None, *names: str) -> Path:
    """The given file, else the first of these names that exists in ``root``."""
    checks.directory(root, "that of the benchmark", "root")
    candidates = [Path(given)] if given is not None else [root / name for name in names]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"annotations: there is no {' or '.join(map(str, candidates))}; Karpathy's splits in this format are at "
            f"{_ANNOTATIONS}"
        )
    return path


@contextmanager
def _format_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(f"annotations: {path} is not in COCO's caption format or Karpathy's") from error


def _coco_captions(content: dict[str, Any]) -> list[tuple[Path, list[str]]]:
    """File names of images, ordered by id, and their captions in the order of the file."""
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    images = sorted(content["images"], key=lambda image: image["id"])
    return [(Path(image["file_name"]), captions[image["id"]]) for image in images]


def _karpathy(content: dict[str, Any], path: Path, split: str) -> list[tuple[Path, list[str]]]:
    """Paths relative to the root, and captions. Karpathy's split restval belongs to train."""
    wanted = ("train", "restval") if split == "train" else (split,)
    images = [image for image in content["images"] if image.get("split") in wanted]
    if not images:
        there = sorted({str(image.get("split")) for image in content["images"]})
        raise ValueError(f"split: {path} has no images of the split {split!r}, its splits are {', '.join(there)}")
    return [
        (Path(image.get("filepath", ""), image["filename"]), [sentence["raw"] for sentence in image["sentences"]])
        for image in images
    ]


def _caption_lines(path: Path) -> list[tuple[Path, list[str]]]:
    """Lines ``NAME.jpg,CAPTION`` after a header; captions may contain commas and are not quoted."""
    captions: dict[str, list[str]] = {}
    header, *rows = checks.read_text(path).split("\n")
    if ".jpg," in header:
        raise ValueError(f"annotations: {path} begins with {header!r}, expected a header such as image,caption")
    for row in filter(str.strip, rows):
        name, _, caption = row.strip().partition(".jpg,")
        captions.setdefault(f"{name}.jpg", []).append(caption.strip())
    return [(Path(name), texts) for name, texts in captions.items()]


def _retrieval(pairs: list[tuple[Path, list[str]]], source: Path, root: Path) -> RetrievalSet:
    """Records of images in ``root``. All must exist and have a caption: skipping one would change the recall."""
    if outside := [name for name, _ in pairs if leaves(str(name))]:
        raise ValueError(f"annotations: {source} names {outside[0]}, which is not in {root}: do not trust it")
    pairs = [(root / name, captions) for name, captions in pairs]
    if unusable := [path for path, captions in pairs if not captions or not path.is_file()]:
        raise FileNotFoundError(
            f"root: {len(unusable)} of the {len(pairs)} images that {source} names are missing under {root} or have no "
            f"caption, the first is {unusable[0]}"
        )
    return RetrievalSet([Sample(path.name, str(path), tuple(texts)) for path, texts in pairs])


def _nothing_skipped(records: list[Sample], skips: Skips, source: str | Path) -> RetrievalSet:
    if int(skips) or not records:
        raise ValueError(
            f"root: {source} contains {len(records)} samples with an image and a caption, and {int(skips)} without; "
            f"expected every sample to have both{'; ' * bool(skips.first)}{skips.first}"
        )
    return RetrievalSet(records)


def _classified(directory: Path, shards: list[str], templates: Sequence[Template]) -> ClassificationSet:
    classes = read_lines(directory / "classnames.txt")
    if not templates:
        lines = read_lines(directory / "zeroshot_classification_templates.txt")
        templates = [line.replace("{c}", "{}") for line in lines]
    return ClassificationSet(shards, classes, templates)
