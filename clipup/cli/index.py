"""``clipup index``: features of a directory of images, for ``clipup search``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..progress import printable
from .flags import BatchOptions, parse
from .logs import errors_only
from .outputs import check_directory


@dataclass(kw_only=True)
class Options(BatchOptions):
    """Computes the features of the images (jpg, jpeg, png, webp; heic with the extra "heic") in a directory and its
    subdirectories, for clipup search, turned as their EXIF orientation says. Called again, it encodes what is new or
    changed, with the same model, and continues where it was interrupted. Images that cannot be read are named with
    the reason and skipped, pictures of other kinds are counted; links to directories are not followed.

    Example: clipup index ~/Pictures
    """

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Directory with images."""
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT]")] = None
    """Directory for the index. None: in ~/.local/share/clipup/indexes ($XDG_DATA_HOME instead of ~/.local/share), where
    clipup search finds it by the directory of images."""
    model: str | None = None
    """A model name of open_clip, a directory, or hf-hub:ORG/NAME. None: that of the index; of a new one ViT-B-32-256
    (151 M parameters), whose weights, datacomp_s34b_b86k, are downloaded once (about 605 MB)."""
    pretrained: str | None = None
    """Tag or file of weights for a model given by name, or without --model for ViT-B-32-256."""
    precision: Literal["int8", "fp32", "amp", "amp_bf16", "bf16"] | None = None
    """int8 (experts, MLPs and attention, on the CPU), fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or
    bf16 (bfloat16 weights). None: that of the index; of a new one on a CPU int8, if 128 of the images, encoded both
    ways, agree (cosines of at least 0.98, 0.995 on average); else fp32."""


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup index")
    from ..data.image_files import passed_over
    from ..search import default_directory, index_images

    out = options.out or default_directory(options.images)
    check_directory("out", out)
    index = index_images(
        options.images,
        out,
        model=options.model,
        pretrained=options.pretrained,
        precision=options.precision,
        device=options.device,
        batch_size=options.batch_size,
        workers=options.workers,
        say=_say,
    )
    if others := passed_over(options.images):
        _say(f"passed over {others}")
    for name, reason in index.skipped.items():
        _say(f"skipped {name}: {reason}")
    if agreement := index.encoder.int8_agreement:
        print(
            f"encoded in {'int8' if index.encoder.int8 else index.encoder.precision}: cosines of int8 and float32 are "
            f"{agreement['mean']:.4f} on average, {agreement['least']:.4f} at least"
        )
    print(f"Indexed {len(index.entries)} images, skipped {len(index.skipped)}. Index: {out}")
    return 0


def _say(text: str) -> None:
    print(f"clipup index: {printable(text)}", file=sys.stderr)
