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

from ..data.images import MAX_PIXELS, load_image
from ..data.loaders import EvalSamples
from ..data.samples import Record
from ..data.shard_names import expand_shards, open_shard
from ..data.skips import Skips
from ..data.tars import read_samples
from ..progress import progress
from .encode import device_of, encode_images, evaluating
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
        for image, label in progress(samples, "classifying", "images", show=show_progress):
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
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no line of text; expected one name a line")
    return lines


def read_text(path: str | Path) -> str:
    """A file's text. Raises ``ValueError``, naming it, when it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, such as with `iconv -t UTF-8`") from error


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
    max_image_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[Tensor, int]]:
    """Reads and preprocesses what ``image_folder`` found, a batch at a time in ``workers`` processes.

    Raises:
        ValueError: naming the image that cannot be read: leaving it out would change the accuracy.
    """
    records = [Record(path.name, str(path), (), metadata={"label": label}) for path, label in found]
    samples = EvalSamples(records, preprocess, Skips(), strict=True, max_image_pixels=max_image_pixels)
    for images, _, metadata in samples.batches(batch_size, workers):
        yield from ((image, about["label"]) for image, about in zip(images, metadata, strict=True))


def image_shards(shards: str | Sequence[str], max_image_pixels: int = MAX_PIXELS) -> Iterator[tuple[Image.Image, int]]:
    """(image, class index) of WebDataset samples with an image and a ``cls``.

    Args:
        shards: as in ``clipup.data.loaders.train_loader``, or a list of such.

    Raises:
        FileNotFoundError, ValueError: no such shard, a damaged one, or a sample without image or class.
    """

    def refuse(name: str, reason: object, samples: int) -> None:
        raise ValueError(f"cannot read {name}: {reason}; repair or remove it")

    for shard in [
        one for pattern in ([shards] if isinstance(shards, str) else shards) for one in expand_shards(pattern, "images")
    ]:
        with open_shard(shard) as file:
            for sample in read_samples(file, shard, refuse, images=True):
                named = f"{sample.key} of {shard}"
                if sample.image is None or "cls" not in sample.content:
                    raise ValueError(f"sample {named} lacks an image or its .cls")
                try:
                    found = load_image(sample.content[sample.image], max_image_pixels), int(sample.content["cls"])
                except Exception as error:  # PIL has no common class for what a broken file may raise
                    raise ValueError(f"cannot read sample {named}: {error}; repair or remove it") from error
                yield found
