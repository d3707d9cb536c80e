"""``clipup index``: features of a directory of images, for ``clipup search``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..progress import printable
from .flags import EncodingOptions, parse
from .logs import errors_only


@dataclass(kw_only=True)
class Options(EncodingOptions):
    """Computes the features of the images (jpg, jpeg, png, webp) in a directory and its subdirectories, for clipup
    search, turned as their EXIF orientation says. Called again, it encodes what is new or changed, and continues where
    it was interrupted. Images that cannot be read are named and skipped, pictures of other kinds are counted; links to
    directories are not followed.

    Example: clipup index photos/ photos.index --model logs/b16-moe/model --int8
    """

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Directory with images."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the index."""
    model: str
    """A model name of open_clip, a directory, or hf-hub:ORG/NAME."""
    pretrained: str | None = None
    """Tag or file of weights for a model given by name."""


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup index")
    from ..data.image_files import image_files, passed_over
    from ..evaluate.encode import encode_images
    from ..inference.accelerate import for_inference
    from ..models import factory, model_names
    from ..search import update_index
    from ..search.image_index import Encoder, digest

    model_names.refuse_random_weights("pretrained", options.model, options.pretrained)
    records = image_files(options.images)
    model, _, preprocess = factory.create_model_and_transforms(
        options.model, options.pretrained, precision=options.precision, device=options.device
    )
    model_digest = digest(model, options.model)
    model = for_inference(model, options.precision, "int8" if options.int8 else None)
    directory = model_names.directory_of(options.model)
    name = options.model if directory is None else f"{model_names.LOCAL_PREFIX}{directory.resolve()}"
    pretrained = options.pretrained
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    index = update_index(
        options.out,
        options.images,
        records,
        Encoder(name, pretrained, options.precision, options.int8, model_digest),
        lambda images: encode_images(model, images, options.batch_size, options.precision),
        preprocess,
        batch_size=options.batch_size,
        workers=options.workers,
        show_progress=True,
    )
    if others := passed_over(options.images):
        print(f"clipup index: passed over {others}", file=sys.stderr)
    for name in index.skipped:
        print(f"clipup index: skipped {printable(name)}", file=sys.stderr)
    print(f"{len(index.entries)} images, {len(index.skipped)} skipped: {options.out}")
    return 0
