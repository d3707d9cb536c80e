"""``clipup export``: programs of a model's encoders, for use without this package's Python code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .flags import parse
from .outputs import check_directory


@dataclass
class Options:
    """Writes image.pt2 and text.pt2: the encoders of a model as programs of torch.export, or compiled by AOTInductor.
    They take batches of 1 to 65,536. A process that loads those of a sparse model imports clipup_kernels first.

    Example: clipup export models/b16-moe programs --aot
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A directory that clipup saved, or the name of an open_clip model."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the programs."""
    pretrained: str | None = None
    """Tag or file of open_clip weights, needed for a model known by name."""
    aot: bool = False
    """Compile for this machine: torch._inductor.aoti_load_package loads the files. Otherwise torch.export.load does."""
    overwrite: bool = False
    """Replace programs that are there."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup export")
    from ..models import model_names
    from ..models.exporting import SUFFIX, save_encoders
    from ..models.factory import create_model_and_transforms

    model_names.refuse_random_weights("pretrained", options.model, options.pretrained)
    check_directory("out", options.out)
    existing = sorted(path.name for path in options.out.glob(f"*{SUFFIX}"))
    if existing and not options.overwrite:
        raise FileExistsError(
            f"{options.out} holds {', '.join(existing)}; pass --overwrite, or choose another directory"
        )
    model, *_ = create_model_and_transforms(options.model, options.pretrained)
    for path in save_encoders(model, options.out, options.aot).values():
        print(f"wrote {path}")
    return 0
