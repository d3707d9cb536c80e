"""``clipup index``: features of a directory of images, for ``clipup search``."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..precision import Precision
from ..progress import printable, progress
from .flags import BatchOptions, parse
from .logs import errors_only

_DEFAULT = ("ViT-B-32-256", "datacomp_s34b_b86k")
"""Name and weights of the model for photographs."""
_COMPARED = 128
"""Images, at most, on which int8 is tried."""


@dataclass(kw_only=True)
class Options(BatchOptions):
    """Computes the features of the images (jpg, jpeg, png, webp; heic with the extra "heic") in a directory and its
    subdirectories, for clipup search, turned as their EXIF orientation says. Called again, it encodes what is new or
    changed, with the same model, and continues where it was interrupted. Images that cannot be read are named and
    skipped, pictures of other kinds are counted; links to directories are not followed.

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
    import open_clip

    from ..data.image_files import image_files, passed_over
    from ..data.skips import Skips
    from ..evaluate.encode import encode_images
    from ..inference.accelerate import for_inference
    from ..models import factory, hub, model_names
    from ..search import default_directory, update_index
    from ..search.image_index import Encoder, digest, earlier_index, upright_samples
    from ..search.int8_agreement import compare_int8, int8_agrees

    records = image_files(options.images)
    out = options.out or default_directory(options.images)
    found = earlier_index(out)
    earlier = None if found is None else found.encoder
    gone = set() if found is None else {entry.name for entry in found.entries} - {record.key for record in records}
    if gone:
        print(f"clipup index: {len(gone)} images are not there any more, and leave the index", file=sys.stderr)
    name, pretrained = options.model or _DEFAULT[0], options.pretrained
    if options.model is None and pretrained is None:
        name, pretrained = _DEFAULT if earlier is None else (earlier.model, earlier.pretrained)
    model_names.refuse_random_weights("pretrained", name, pretrained)
    if model_names.get_model_config(name)["text_cfg"].get("hf_tokenizer_name") == "words:icons":
        print(f"clipup index: {name} was trained on icons, and finds little in photographs", file=sys.stderr)
    repository = open_clip.get_pretrained_cfg(*_DEFAULT)["hf_hub"].rstrip("/")
    if (name, pretrained) == _DEFAULT and hub.will_download(repository):
        print(f"clipup index: downloads {name} (151 M parameters, about 605 MB)", file=sys.stderr)
    int8, agreement = options.precision == "int8", None
    precision: Precision = "fp32" if options.precision is None or options.precision == "int8" else options.precision
    if earlier is not None and options.precision is None:
        int8, precision, agreement = earlier.int8, earlier.precision, earlier.int8_agreement
    device = "cpu" if int8 else options.device
    model, _, preprocess = factory.create_model_and_transforms(name, pretrained, precision=precision, device=device)
    model_digest = digest(model, name)
    if earlier is None and options.precision is None and device == "cpu":
        compared = random.Random(0).sample(records, min(_COMPARED, len(records)))
        batches = upright_samples(compared, preprocess, Skips()).batches(options.batch_size, options.workers)
        agreement = compare_int8(model, (images for images, *_ in progress(batches, "trying int8", "batches")))
        int8 = int8_agrees(agreement)
    model = for_inference(model, precision, "int8" if int8 else None)
    directory = model_names.directory_of(name)
    if directory is not None:
        name = f"{model_names.LOCAL_PREFIX}{directory.resolve()}"
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    index = update_index(
        out,
        options.images,
        records,
        Encoder(name, pretrained, precision, int8, model_digest, agreement),
        lambda images: encode_images(model, images, options.batch_size, precision),
        preprocess,
        batch_size=options.batch_size,
        workers=options.workers,
        show_progress=True,
    )
    if others := passed_over(options.images):
        print(f"clipup index: passed over {others}", file=sys.stderr)
    for name in index.skipped:
        print(f"clipup index: skipped {printable(name)}", file=sys.stderr)
    if agreement is not None:
        print(
            f"encoded in {'int8' if int8 else precision}: cosines of int8 and float32 are {agreement['mean']:.4f} on "
            f"average, {agreement['least']:.4f} at least"
        )
    print(f"{len(index.entries)} images, {len(index.skipped)} skipped: {out}")
    return 0
