"""``clipup index``: features of a directory of images, for ``clipup search``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..precision import Precision, check_device, default_workers
from ..progress import printable, progress
from .flags import at_least, check_int8, parse
from .logs import errors_only


@dataclass
class Options:
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
    precision: Precision = "fp32"
    """fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights)."""
    int8: bool = False
    """Quantize experts, MLPs and attention (clipup.accelerate(model, weights="int8")); on CPUs, with fp32 or bf16."""
    batch_size: int = 64
    """Images in a batch."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: cuda if torch finds a GPU, else cpu."""

    def check(self) -> None:
        """
        Raises:
            ValueError: an option has a value that is refused, or two contradict each other.
        """
        self.device = check_device(self.device)
        check_int8(self.int8, self.precision, self.device)
        at_least(self, 0, "workers")
        at_least(self, 1, "batch_size")


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup index")
    options.check()
    from ..data.samples import image_files, passed_over
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
    file = options.pretrained is not None and Path(options.pretrained).is_file()
    pretrained = str(Path(options.pretrained).resolve()) if file and options.pretrained else options.pretrained
    made = update_index(
        options.out,
        options.images,
        records,
        Encoder(name, pretrained, options.precision, options.int8, model_digest),
        lambda images: encode_images(model, images, options.batch_size, options.precision),
        preprocess,
        batch_size=options.batch_size,
        workers=options.workers,
        show=lambda batches: progress(batches, "encoding images", "batches"),
    )
    if others := passed_over(options.images):
        print(f"clipup index: passed over {others}", file=sys.stderr)
    for name, reason in made.skipped.items():
        print(f"clipup index: skipped {printable(name)}: {printable(reason)}", file=sys.stderr)
    print(f"{len(made.entries)} images, {len(made.skipped)} skipped: {options.out}")
    return 0
