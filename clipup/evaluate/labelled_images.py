"""Images with class labels, from directories and from shards, and lists of class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from .. import checks
from ..data.evaluation import EvalSamples
from ..data.image_files import READ, visible
from ..data.images import MAX_PIXELS, load_image
from ..data.samples import Sample
from ..data.shard_names import expand_shards, open_shard
from ..data.skips import Skips
from ..data.tars import lines, read_samples

KINDS = sorted({*READ, *(extension[1:] for extension in IMG_EXTENSIONS)})
"""Kinds of files that ``image_folder`` reads."""
_SHOWN = 3
"""Names that a message lists."""


def read_lines(path: str | Path, kind: str = "name") -> list[str]:
    """The non-blank lines of a text file: class names, templates with ``{}``, or another ``kind`` of line.

    Raises:
        FileNotFoundError, ValueError: no such file, or an empty file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a text file with one {kind} per line")
    listed = lines(checks.read_text(Path(path)))
    if not listed:
        raise ValueError(f"{path} is empty; expected one {kind} per line")
    return listed


def image_folder(directory: str | Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of a directory with one subdirectory per class, with their class indices. Hidden files are left out.

    If subdirectories are named by classes, names decide; upper and lower case, and "_", "-" and " ", count as the same.
    If all are numbers, these are the indices. Otherwise the sorted subdirectories are the classes in the order of the
    list (as with ImageNet).

    Raises:
        FileNotFoundError, ValueError: no such directory, a wrong number of subdirectories, only some of them named by
            classes or by a class that is twice in the list, numbers other than 0 to N - 1 for N classes, or no image.
    """
    root = Path(directory)
    checks.directory(directory, "one with a subdirectory per class")
    folders = sorted(path for path in visible(root, "*") if path.is_dir())
    labels = _labels(directory, [folder.name for folder in folders], classes)
    images = [
        (path, label)
        for folder, label in zip(folders, labels, strict=True)
        for path in sorted(visible(folder))
        if path.suffix.lower()[1:] in KINDS
    ]
    if not images:
        raise ValueError(f"no image ({', '.join(KINDS)}) in the subdirectories of {directory}")
    return images


def _labels(directory: str | Path, names: list[str], classes: Sequence[str]) -> list[int]:
    """The class of each subdirectory, in the order of their sorted names."""
    index = {_folded(name): number for number, name in enumerate(classes)}
    every = list(range(len(classes)))
    labels = [index[_folded(name)] for name in names if _folded(name) in index]
    by_name = bool(labels)
    if not by_name:
        numbered = all(name.isascii() and name.isdecimal() for name in names)
        labels = [int(name) for name in names] if numbered else list(range(len(names)))
    if not (len(labels) == len(names) and len(index) == len(classes) if by_name else sorted(labels) == every):
        raise ValueError(
            f"{directory} has {len(names)} subdirectories, {', '.join(names[:_SHOWN])}, ..., and the class list has "
            f"{len(classes)} names; expected subdirectories that are all named as classes, the numbers 0 to "
            f"{len(classes) - 1}, each once, or one for each name in the same order"
        )
    return labels


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def labelled_images(
    files: Sequence[tuple[Path, int]],
    preprocess: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    workers: int = 0,
    max_image_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[Tensor, int]]:
    """Reads and preprocesses the images of ``image_folder``, in batches by ``workers`` processes.

    Raises:
        ValueError: an unreadable image, by name: skipping it would change the accuracy.
    """
    records = [Sample(path.name, str(path), (), metadata={"label": label}) for path, label in files]
    samples = EvalSamples(records, preprocess, Skips(), strict=True, max_image_pixels=max_image_pixels)
    for images, _, metadata in samples.batches(batch_size, workers):
        yield from ((image, about["label"]) for image, about in zip(images, metadata, strict=True))


def image_shards(
    shards: str | Sequence[str],
    max_image_pixels: int = MAX_PIXELS,
    preprocess: Callable[[Image.Image], Any] = lambda image: image,
) -> Iterator[tuple[Any, int]]:
    """(preprocessed image, class index) of WebDataset samples with an image and a ``cls``.

    Args:
        shards: a pattern as in ``clipup.data.loaders.train_loader``, or a list of patterns.
        preprocess: default: images as they are.

    Raises:
        FileNotFoundError, ValueError: no such shard, a damaged one, or a sample without image or class.
    """

    def refuse(name: str, reason: object, samples: int) -> None:
        raise ValueError(f"cannot read {name}: {reason}; repair or remove it")

    patterns = [shards] if isinstance(shards, str) else shards
    for shard in [shard for pattern in patterns for shard in expand_shards(pattern, "images")]:
        with open_shard(shard) as file:
            for sample in read_samples(file, shard, refuse, images=True):
                try:
                    content = sample.content[sample.image or "image"]
                    pair = preprocess(load_image(content, max_image_pixels)), int(sample.content["cls"])
                except Exception as error:  # PIL has no common class for what a broken file may raise
                    raise ValueError(
                        f"cannot read sample {sample.key} of {shard}: {type(error).__name__}: {error}; it needs an "
                        "image and a .cls"
                    ) from error
                yield pair
