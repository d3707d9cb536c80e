"""``clipup search``: the images of an index that fit a text, or another image, best."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..option_group import option
from ..progress import printable
from .flags import DeviceOptions, parse
from .logs import errors_only
from .outputs import check_file, write_text


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """Finds the images that fit texts or another image best, in an index (clipup index), with the model that made it.
    Prints their scores and paths; with --page it also writes them as one HTML page with pictures, which link to the
    files.

    Example: clipup search ~/Pictures "a red bicycle" --page found.html
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES_OR_INDEX")]
    """Directory of images that was indexed, or directory of the index."""
    texts: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT ...]")]
    """What to look for; several texts are searched for one by one."""
    image: Path | None = None
    """Image file; similar images are searched for."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = option(12, least=1)
    """Images per text."""
    min_score: float = -1.0
    """Least score of an image: the cosine of its features and those of the text."""
    paths_only: bool = False
    """Print only the paths, one a line, as they are."""
    page: Path | None = None
    """File for a page with the pictures; an earlier file is replaced."""

    def check(self) -> None:
        """
        Raises:
            ValueError: an option has a value that is refused, or two contradict each other.
        """
        super().check()
        if not (self.texts or self.image) or not all(text.strip() for text in self.texts):
            raise ValueError("texts: expected at least one text that is not blank, or --image")
        if self.image is not None and not self.image.is_file():
            raise ValueError(
                f"image: {self.image} is {'a directory' if self.image.is_dir() else 'not there, or no regular file'}; "
                "expected the path of an image file"
            )
        if self.page is not None and self.page.suffix != ".html":
            raise ValueError(f"page: expected a name that ends in .html, got {self.page}")


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup search")
    import torch

    from ..search import ImageIndex, find, results_page
    from ..search.encoder import load_encoder

    if options.page is not None:
        check_file("page", options.page)
    index = ImageIndex.load(options.source)
    encoder = load_encoder(index.encoder, device=options.device, say=partial(print, "clipup search:", file=sys.stderr))
    index.check_encoder(encoder.encoder)
    queries, features = [*options.texts], []
    if options.texts:
        features.append(encoder.texts(options.texts))
    if options.image is not None:
        queries.append(str(options.image))
        features.append(encoder.image_file(options.image))
    found = find(index, torch.cat(features), options.count, options.min_score)
    answers = list(zip(queries, found, strict=True))
    if options.paths_only:
        paths = [os.fsencode(result.path) + b"\n" for _, results in answers for result in results]
        sys.stdout.buffer.write(b"".join(paths))
    else:
        for query, results in answers:
            print(printable(query))
            for result in results:
                print(f"{result.score:8.4f}  {printable(str(result.path))}")
    if options.page is not None:
        write_text(options.page, results_page(index, answers, shlex.join(["clipup", "search", *argv])))
        print(f"page: {options.page}", file=sys.stderr)
    return 0
