"""Images with all their captions, read for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import default_collate

from .images import MAX_PIXELS, load_image, read_sample
from .processes import each
from .samples import Sample, content_at
from .skips import Note, Notes, Retries, Skips

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms import Resize


class EvalSamples:
    """Images with all their captions, for retrieval, in the order of the files.

    Iterating gives `(image [C, H, W], captions, metadata)` per sample; `batches` gives batches. `len()` is the number
    of samples in the source, `skipped` the number of samples that were incomplete or unreadable so far; more than
    `skips` allows raise ValueError. With `strict`, for benchmarks, every unreadable image raises ValueError, naming it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Callable | None,
        skips: Skips,
        strict: bool = False,
        max_image_pixels: int = MAX_PIXELS,
        resize: Resize | None = None,
    ) -> None:
        """
        Args:
            preprocess: PIL image to tensor; None where no image is read, or the attribute is set before.
            resize: for `load_image`, which decodes and resizes faster with it, with almost the same pixels.
        """
        self.samples, self.preprocess, self.strict = samples, preprocess, strict
        self.max_image_pixels, self.resize = max_image_pixels, resize
        self.skips, self._total = skips, len(samples) + int(skips)
        self.read_at_once, self.workers = 1, 0
        """How iterating reads: images in a batch, and processes that read them."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def skipped(self) -> int:
        return int(self.skips)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], dict]]:
        for batch in self.batches(self.read_at_once, self.workers):
            yield from zip(*batch, strict=True)

    def only(self, samples: Sequence[Sample]) -> EvalSamples:
        """Some of the samples, such as those of one process of a distributed evaluation. What is skipped counts against
        all of them."""
        part = copy.copy(self)
        part.samples = samples
        return part

    def check_all(self, gather: Callable[[Any], list[Any]]) -> None:
        """Raises ValueError when all processes together skipped more than may be. Arguments as in `check_together`."""
        self.skips.check_together(self._total, self.skips.samples, gather)

    def batches(self, batch_size: int, workers: int = 0) -> Iterator[tuple[Tensor, list[list[str]], list[dict]]]:
        """Batches `(images [B, C, H, W], captions per image, metadata per image)`.

        A batch with unreadable images is smaller. Metadata is the sample's json (concept, source, group) without its
        captions, and its `key`.
        """
        chunks = [self.samples[start : start + batch_size] for start in range(0, len(self.samples), batch_size)]
        assert self.preprocess is not None  # set before images are read
        read = partial(_read, self.preprocess, self.max_image_pixels, self.resize, Retries())
        with closing(each(read, chunks, workers)) as batches:
            for chunk, (images, rows, skipped) in zip(chunks, batches, strict=True):
                if skipped and self.strict:
                    name, reason, _ = skipped[0]
                    raise ValueError(f"cannot read the image {name}: {reason}; repair or remove it")
                self.skips.add(skipped)
                self.skips.check(self._total)
                kept = [chunk[row] for row in rows]
                if kept:
                    yield images, [list(sample.captions) for sample in kept], [dict(sample.metadata) for sample in kept]


def _read(
    preprocess: Callable[[Image], Tensor],
    max_pixels: int,
    resize: Resize | None,
    retried: Retries,
    samples: Sequence[Sample],
) -> tuple[Tensor | None, list[int], list[Note]]:
    """The readable images [B, C, H, W], their numbers among the samples, and notes on the others."""
    images, notes = dict[int, Tensor](), Notes()
    for row, sample in enumerate(samples):
        name = partial(str, sample.named)
        read = partial(retried, name, partial(_content, sample))
        image_and_captions = read_sample(read, name, preprocess, max_pixels, notes.add, resize)
        if image_and_captions is not None:
            images[row] = image_and_captions[0]
    return default_collate([*images.values()]) if images else None, [*images], notes.report().skipped


def read_image(sample: Sample) -> Image:
    """The image of a sample. Raises as `load_image`."""
    return load_image(_content(sample)[0])


def _content(sample: Sample) -> tuple[bytes, list[str]]:
    with open(sample.path, "rb") as file:
        return content_at(file, sample.offset, sample.size), []
