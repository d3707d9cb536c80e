"""``clipup inspect``: what the experts of a sparse model do, as one HTML page."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..data.images import upright
from ..data.skips import Note, Skips
from ..models import known_models
from ..option_group import option
from ..progress import progress
from .flags import DeviceOptions, parse
from .logs import errors_only
from .outputs import check_file, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..data.samples import Sample


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """Shows what the experts of a sparse model do: which expert took which patch and which token, how evenly they are
    used, how similar they are, and what each takes most. One HTML page that needs no server.

    Example: clipup inspect logs/b16-moe --images photos/ --captions captions.txt --dense ViT-B-16 --dense-pretrained
    laion2b_s34b_b88k
    """

    run_or_model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """A directory with a sparse model, or that of a training run: its model or, while it goes on, its newest
    checkpoint."""
    images: str | None = None
    """Directory with images (searched with its subdirectories), or evaluation shards ("test-*.tar")."""
    captions: Path | None = None
    """Text file with one caption per line. None: those in the shards, if images are shards."""
    dense: str | None = None
    """The model that was upcycled, to compare the experts with: a name that open_clip knows, or a directory."""
    dense_pretrained: str | None = option(None, idle={"without --dense": lambda group: group.dense is None})
    """Tag or file of weights for a dense model known by name."""
    out: Path = Path("experts.html")
    """File for the page; an earlier file is replaced."""
    max_images: int = option(200, least=1)
    """Number of images, and of captions, to inspect; the first are taken."""
    shown: int = option(6, least=0)
    """Pictures and captions that are shown whole."""
    batch_size: int = option(32, least=1)
    """Images, or captions, in a batch."""


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup inspect")
    from ..data.image_files import passed_over
    from ..evaluate.labelled_images import read_lines
    from ..inspection.expert_report import inspect_experts
    from ..models import factory, model_names
    from .runs import load_for_inference, trained_steps

    if options.dense is not None:
        model_names.refuse_random_weights("dense_pretrained", options.dense, options.dense_pretrained)
    check_file("out", options.out)
    path = options.run_or_model.removeprefix(known_models.LOCAL_PREFIX)
    records, skips = ([], Skips()) if options.images is None else find_images(options.images)
    records = records[: options.max_images]
    in_shards = [record.captions[0] for record in records if record.captions]
    captions = in_shards if options.captions is None else read_lines(options.captions, "caption")[: options.max_images]
    model, preprocess, tokenizer = load_for_inference(f"{known_models.LOCAL_PREFIX}{path}", device=options.device)
    dense = (
        None
        if options.dense is None
        else factory.create_model_and_transforms(options.dense, options.dense_pretrained, device=options.device)[0]
    )
    labels: list[str] = []
    report = inspect_experts(
        model,
        progress(_readable(records, labels, skips), "routing images", "images", total=len(records)),
        captions,
        preprocess=preprocess,
        tokenizer=tokenizer,
        dense=dense,
        name=Path(path).resolve().name,
        batch_size=options.batch_size,
    )
    report = dataclasses.replace(report, skipped=skips.reasons, labels=labels, steps=trained_steps(Path(path)))
    write_text(options.out, report.page(options.shown))
    if options.images is not None and (others := passed_over(options.images)):
        print(f"clipup inspect: passed over {others}", file=sys.stderr)
    left_out = f", {len(skips.reasons)} skipped (such as {skips.first})" if skips.reasons else ""
    print(f"{len(report.pictures)} images and {len(report.captions)} captions{left_out}: {options.out}")
    return 0


def find_images(source: str) -> tuple[list[Sample], Skips]:
    """The images of a directory, or of evaluation shards (which bring captions), in the order of their names; and the
    incomplete samples of the shards.

    Raises:
        FileNotFoundError: no such directory or shards, or no image in it.
        ValueError: no sample of the shards is complete.
    """
    from ..data.image_files import image_files
    from ..data.loaders import eval_samples

    if ".tar" not in Path(source).name:
        return image_files(source), Skips()
    samples = eval_samples(source, preprocess=None, argument="images", max_skipped=1.0)
    return list(samples.samples), samples.skips


def _readable(records: list[Sample], labels: list[str], skips: Skips) -> Iterator[Image]:
    """The images that can be read, whose names and captions go into ``labels``; the others go into ``skips``."""
    from ..data.evaluation import read_image

    for record in records:
        try:
            image = upright(read_image(record))
        except Exception as error:  # PIL has no common class for what a broken file may raise
            skips.add([Note(record.key, f"{type(error).__name__}: {error}")])
            continue
        labels.append(" · ".join((record.key, *record.captions[:1])))
        yield image
    if records and not labels:
        raise ValueError(f"images: none of the {len(records)} can be read, such as {skips.first}")
