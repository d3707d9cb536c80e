"""``clipup search``: the images of an index that fit a text best."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
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
    """Finds the images of an index (clipup index) that fit texts best, with the model that made it. Prints their scores
    and paths; with --page it also writes them as one HTML page with pictures.

    Example: clipup search photos.index "a red bicycle" --page found.html
    """

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Directory of the index."""
    texts: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT [TEXT ...]")]
    """What to look for; several texts are searched for one by one."""
    count: int = option(12, least=1)
    """Images per text."""
    page: Path | None = None
    """File for a page with the pictures; an earlier one is replaced."""

    def check(self) -> None:
        """
        Raises:
            ValueError: an option has a value that is refused, or two contradict each other.
        """
        super().check()
        if not self.texts or not all(text.strip() for text in self.texts):
            raise ValueError("texts: expected at least one text that is not blank")


@errors_only()
def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup search")
    from ..evaluate.encode import encode_texts
    from ..inference.accelerate import for_inference
    from ..models import factory, tokenizers
    from ..search import ImageIndex, find, results_page
    from ..search.image_index import digest

    if options.page is not None:
        check_file("page", options.page)
    index = ImageIndex.load(options.index)
    encoder = index.encoder
    device = "cpu" if encoder.int8 else options.device  # where int8 runs
    model, *_ = factory.create_model_and_transforms(
        encoder.model, encoder.pretrained, precision=encoder.precision, device=device
    )
    index.check_model(digest(model, encoder.model))
    model = for_inference(model, encoder.precision, "int8" if encoder.int8 else None)
    texts = encode_texts(model, options.texts, tokenizers.get_tokenizer(encoder.model), precision=encoder.precision)
    answers = list(zip(options.texts, find(index, texts, options.count), strict=True))
    for text, results in answers:
        print(text)
        for result in results:
            print(f"{result.score:8.4f}  {printable(str(result.path))}")
    if options.page is not None:
        write_text(options.page, results_page(index, answers, shlex.join(["clipup", "search", *argv])))
        print(f"page: {options.page}")
    return 0
