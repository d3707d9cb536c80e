"""Zero-shot classification: every class name becomes a text feature, an image goes to the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..data.loaders import EvalSamples
from ..data.samples import IMAGE_EXTENSIONS, Record, Skips, expand_shards, load_image
from ..extras import needed_for
from .encode import device_of, encode_images, evaluating, progress
from .precision import Precision, autocast

Template = Callable[[str], str] | str
"""A prompt: a function of the class name, or a string with ``{}`` in its place."""
TEMPLATES = open_clip.SIMPLE_IMAGENET_TEMPLATES
"""open_clip's seven short prompts."""
TOP_K = (1, 5)


def zero_shot(
    model: nn.Module,
    samples: Iterable[tuple[Any, int]],
    classes: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
    preprocess: Callable[[Any], Tensor] | None = None,
    templates: Sequence[Template] = TEMPLATES,
    batch_size: int = 64,
    precision: Precision = "fp32",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Accuracy as fractions of 1.

    Args:
        model: open_clip's CLIP, dense or sparse, on its device.
        samples: (image, class index) pairs.
        classes: a name a class.
        preprocess: image to tensor [3, height, width]; None when the images are tensors already.
        templates: functions of a class name, or strings with ``{}`` in its place.

    Returns:
        ``top1``, ``top5`` (of all classes where there are fewer), ``chance`` (of top1), ``images``, ``classes``.

    Raises:
        ValueError: no images, no classes, no templates, or a class index without a name.
    """
    for name, value in (("classes", classes), ("templates", templates)):
        if not value:
            raise ValueError(f"{name} is empty; expected at least one")
    labels: list[int] = []

    def images() -> Iterator[Tensor]:
        for image, label in progress(samples, "classifying", show_progress):
            if not 0 <= label < len(classes):
                raise ValueError(f"image {len(labels)} is of class {label}, but {len(classes)} class names were given")
            labels.append(label)
            yield image if preprocess is None else preprocess(image)

    image_features = encode_images(model, images(), batch_size, precision)
    device = device_of(model)
    with evaluating(model), autocast(precision, device):
        classifier = open_clip.build_zero_shot_classifier(
            model,
            tokenizer,
            classnames=list(classes),
            templates=list(templates),
            num_classes_per_batch=max(1, batch_size // len(templates)),
            device=device,
        )
    best = (image_features @ classifier.float().cpu()).topk(min(max(TOP_K), len(classes)), dim=1).indices
    right = best == torch.tensor(labels)[:, None]
    accuracy = {f"top{k}": right[:, :k].any(1).double().mean().item() for k in TOP_K}
    return {**accuracy, "chance": 1 / len(classes), "images": len(labels), "classes": len(classes)}


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank: class names, or templates with ``{}``.

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a text file with one name a line")
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no line of text; expected one name a line")
    return lines


def image_folder(directory: str | Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of a directory that has a subdirectory for every class, with their class indices.

    A subdirectory is found by the name of its class where all of them are; else the subdirectories in sorted order are
    the classes in the order of the list (as with ImageNet's).

    Raises:
        FileNotFoundError, ValueError: no such directory, another number of subdirectories, or no image in them.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; expected one with a subdirectory for every class")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    names = [folder.name for folder in folders]
    if set(names) <= set(classes):
        label_of = {folder: list(classes).index(folder.name) for folder in folders}
    elif len(folders) == len(classes):
        label_of = {folder: label for label, folder in enumerate(folders)}
    else:
        raise ValueError(
            f"{directory} has {len(folders)} subdirectories, the class list {len(classes)} names; expected one "
            "subdirectory for each name in the same order, or subdirectories that bear the names"
        )
    found = [
        (path, label)
        for folder, label in label_of.items()
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMG_EXTENSIONS
    ]
    if not found:
        raise ValueError(f"no image ({', '.join(IMG_EXTENSIONS)}) in the subdirectories of {directory}")
    return found


def labelled_images(
    found: Sequence[tuple[Path, int]],
    preprocess: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[tuple[Tensor, int]]:
    """Reads and preprocesses what ``image_folder`` found, a batch at a time in ``workers`` processes.

    Raises:
        ValueError: naming the image that cannot be read: leaving it out would change the accuracy.
    """
    records = [Record(path.name, str(path), (), metadata={"label": label}) for path, label in found]
    for images, _, metadata in EvalSamples(records, preprocess, Skips(), strict=True).batches(batch_size, workers):
        yield from ((image, about["label"]) for image, about in zip(images, metadata, strict=True))


def image_shards(shards: str | Sequence[str]) -> Iterator[tuple[Image.Image, int]]:
    """(image, class index) of WebDataset samples with an image and a ``cls``; braces name several shards.

    Raises:
        FileNotFoundError, ValueError: no such shard, or a sample without image or class.
    """
    with needed_for("reading labelled images from shards", "eval"):
        import webdataset
    for sample in webdataset.WebDataset(expand_shards(shards, "images"), shardshuffle=False):
        image = next((sample[key] for key in IMAGE_EXTENSIONS if key in sample), None)
        if image is None or "cls" not in sample:
            raise ValueError(f"sample {sample['__key__']} of {sample['__url__']} lacks an image or its .cls")
        try:  # webdataset's own decoders would unpickle whatever lies beside the image
            found = load_image(image), int(sample["cls"])
        except Exception as error:  # PIL has no common class for what a broken file may raise
            where = f"sample {sample['__key__']} of {sample['__url__']}"
            raise ValueError(f"cannot read {where}: {error}; mend or remove it") from error
        yield found
