"""Reader of ImageNet-V2 on disk: ROOT/imagenetv2-matched-frequency-format-val/{0..999}/*.jpeg."""

from __future__ import annotations

from pathlib import Path

import open_clip
from torchvision.datasets.folder import IMG_EXTENSIONS

from .datasets import ClassificationSet

_VARIANTS = "[iI]mage[nN]et[vV]2*"


def imagenet_v2(root: str | Path) -> ClassificationSet:
    """ImageNet-V2 (arXiv 1902.10811) with the class names and templates of ``datasets.imagenet``.

    Args:
        root: a variant's directory, as its archive unpacks it: one directory per class, named by the class index from
            0 to 999; or the directory that contains that one alone.

    Raises:
        FileNotFoundError, ValueError: no such directory, not one directory for each of 1,000 classes, or no image.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {folder}; expected one with a subdirectory per class")
    variants = sorted(path for path in folder.glob(_VARIANTS) if path.is_dir())
    if len(variants) > 1:
        names = ", ".join(variant.name for variant in variants)
        raise ValueError(f"{folder} has several variants of ImageNet-V2, {names}; name one of them")
    folder = variants[0] if variants else folder
    named = {path.name: path for path in folder.iterdir() if path.is_dir()}
    classes = open_clip.IMAGENET_CLASSNAMES
    if set(named) != set(map(str, range(len(classes)))):
        raise ValueError(
            f"{folder} has {len(named)} directories, expected {len(classes)} that are named 0 to {len(classes) - 1}, "
            "as in the archives of https://huggingface.co/datasets/vaishaal/ImageNetV2"
        )
    images = [
        (path, label)
        for label in range(len(classes))
        for path in sorted(named[str(label)].iterdir())
        if path.suffix.lower() in IMG_EXTENSIONS
    ]
    if not images:
        raise ValueError(f"no image ({', '.join(IMG_EXTENSIONS)}) in the subdirectories of {folder}")
    return ClassificationSet(images, classes, open_clip.OPENAI_IMAGENET_TEMPLATES)
