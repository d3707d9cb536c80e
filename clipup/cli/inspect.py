"""``clipup inspect``: what the experts of a sparse model do, as one HTML page."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from torch import nn

from .. import checks
from ..atomic_files import replace_files
from ..clip.accelerate import for_inference
from ..data.image_files import image_files
from ..data.images import upright
from ..data.loaders import eval_samples
from ..data.sample_index import Record, read_image
from ..evaluate.labelled_images import read_lines
from ..inspection.expert_report import inspect_experts
from ..precision import check_device, default_device
from ..pretrained import factory, model_names, origin, tokenizers
from ..pretrained.checkpoint_model import checkpoint_model
from ..pretrained.model_directory import CONFIG_NAME
from ..pretrained.state_dicts import read_weights
from ..progress import progress
from ..train import checkpoints
from ..train.run_directory import RunDirectory
from .flags import parse
from .logs import errors_only
from .outputs import check_file


@dataclass
class Options:
    """Shows what the experts of a sparse model do: which expert took which patch and which token, how evenly they are
    used, how similar they are, and what each takes most. One HTML page that needs no server.

    Example: clipup inspect logs/b16-moe --images photos/ --captions captions.txt --dense ViT-B-16 --dense-pretrained
    laion2b_s34b_b88k
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """A directory with a sparse model, or the directory of a training run, whose last model is taken."""
    images: str | None = None
    """Directory with images (searched with its subdirectories), or evaluation shards ("test-*.tar")."""
    captions: Path | None = None
    """Text file with one caption per line. None: those in the shards, if images are shards."""
    dense: str | None = None
    """The model that was upcycled, to compare the experts with: a name that open_clip knows, or a directory."""
    dense_pretrained: str | None = None
    """Tag or file of weights for a dense model known by name."""
    out: Path = Path("report.html")
    """File for the page; an earlier one is replaced."""
    max_images: int = 200
    """Number of images, and of captions, to inspect; the first ones are taken."""
    shown: int = 6
    """Pictures and captions that are shown whole."""
    batch_size: int = 32
    """Images, or captions, in a batch."""
    device: str = field(default_factory=default_device)
    """cpu, cuda or cuda:N."""

    def check(self) -> None:
        """
        Raises:
            ValueError: an option has a value that is refused, or two contradict each other.
        """
        if self.images is None and self.captions is None:
            raise ValueError("nothing to inspect: pass --images, --captions or both")
        if self.dense_pretrained is not None and self.dense is None:
            raise ValueError("dense_pretrained has no effect without --dense, the model whose weights it gives")
        for name, least in (("max_images", 1), ("shown", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup inspect")
    options.check()
    if options.dense is not None:
        origin.refuse_random_weights("dense_pretrained", options.dense, options.dense_pretrained)
    check_device(options.device)
    check_file("out", options.out)
    records = [] if options.images is None else find_images(options.images)[: options.max_images]
    captions = _captions(options, records)[: options.max_images]
    model, preprocess, tokenizer = load(options.model, options.device)
    model = for_inference(model)
    dense = None
    if options.dense is not None:
        dense = factory.create_model_and_transforms(options.dense, options.dense_pretrained, device=options.device)[0]
    skipped: dict[str, str] = {}
    seen = inspect_experts(
        model,
        progress(_readable(records, skipped), "routing images", "images", total=len(records)),
        captions,
        preprocess=preprocess,
        tokenizer=tokenizer,
        dense=dense,
        name=Path(options.model).resolve().name,
        batch_size=options.batch_size,
    )
    seen = dataclasses.replace(seen, skipped=skipped)
    page = seen.page(options.shown)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_files({options.out: lambda path: path.write_text(page, encoding="utf-8")})
    left_out = f", {len(skipped)} skipped, such as {_first(skipped)}" if skipped else ""
    print(f"{len(seen.pictures)} images and {len(seen.captions)} captions{left_out}: {options.out}")
    return 0


def load(path: str, device: str) -> tuple[nn.Module, Any, Any]:
    """The model that a model's or a run's directory stands for, its transform of images, and its tokenizer.

    Of an unfinished run, the newest checkpoint.

    Raises:
        FileNotFoundError: there is no such directory, or neither a model nor a checkpoint in it.
    """
    root = Path(path.removeprefix(model_names.LOCAL_PREFIX))
    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {path}; expected a sparse model's or a training run's")
    run = RunDirectory(root)
    for directory in (root, run.model):
        if (directory / CONFIG_NAME).is_file():
            name = f"{model_names.LOCAL_PREFIX}{directory}"
            model, _, preprocess = factory.create_model_and_transforms(name, device=device)
            return model, preprocess, tokenizers.get_tokenizer(name)
    latest = checkpoints.newest(run.checkpoints)
    if latest is None:
        raise FileNotFoundError(
            f"{path} holds neither a model ({CONFIG_NAME}, or the model/ of a finished run) nor a run's checkpoints"
        )
    for reason in latest.passed_over:
        print(f"clipup inspect: reads {latest.path}, because a checkpoint cannot be used: {reason}", file=sys.stderr)
    options = checks.read_json(root / "options.json")
    named = (options.get("model") or options.get("pretrained")) if isinstance(options, dict) else None
    if not isinstance(named, str):
        raise ValueError(
            f"{root / 'options.json'} names no model; expected the options of a run, as clipup train wrote them"
        )
    weights = read_weights(latest.path)
    model, preprocess, model_cfg, tokenizer_files = checkpoint_model(
        weights, latest.path, None if weights.configs.get("model_cfg") else named
    )
    return model.to(device), preprocess, tokenizers.from_files(model_cfg, tokenizer_files)


def find_images(source: str) -> list[Record]:
    """The images of a directory, or of evaluation shards (which bring captions), in the order of their names.

    Raises:
        FileNotFoundError: no such directory or shards, or no image in it.
    """
    if ".tar" in Path(source).name:
        return list(eval_samples(source, preprocess=None).records)
    if not Path(source).is_dir():
        raise FileNotFoundError(f"images: there is no directory {source}; expected one with images, or .tar shards")
    return image_files(source)


def _captions(options: Options, records: list[Record]) -> list[str]:
    if options.captions is None:
        return [record.captions[0] for record in records if record.captions]
    return read_lines(options.captions, "caption")


def _readable(records: list[Record], skipped: dict[str, str]) -> Iterator[Image.Image]:
    """The images that can be read; the others go into ``skipped`` with the reason."""
    for record in records:
        try:
            image = upright(read_image(record))
        except Exception as error:  # PIL has no common class for what a broken file may raise
            skipped[record.key] = f"{type(error).__name__}: {error}"
            continue
        yield image
    if records and len(skipped) == len(records):
        raise ValueError(f"images: none of the {len(records)} can be read, such as {_first(skipped)}")


def _first(skipped: dict[str, str]) -> str:
    name, reason = next(iter(skipped.items()))
    return f"{name} ({reason})"
