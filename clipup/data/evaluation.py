"""Images with all their captions, read for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .images import MAX_PIXELS, load_image, preprocessed
from .processes import reading, worker_init_fn
from .samples import Sample
from .skips import Retries, Skips, raise_lack

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
        assert self.preprocess is not None  # set before images are read
        loader = DataLoader(
            Images(self.samples, self.preprocess, self.max_image_pixels, self.resize),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=readable,
            worker_init_fn=worker_init_fn(),
            generator=torch.Generator(),
        )
        samples = iter(self.samples)
        with reading(loader) as batches:
            for images, reasons in batches:
                kept = []
                for reason, sample in zip(reasons, samples, strict=False):
                    if reason:
                        self._note(sample, reason)
                    else:
                        kept.append(sample)
                if kept:
                    captions = [list(sample.captions) for sample in kept]
                    yield images, captions, [dict(sample.metadata) for sample in kept]

    def _note(self, sample: Sample, reason: str) -> None:
        if self.strict:
            raise ValueError(f"cannot read the image {sample.named}: {reason}; repair or remove it")
        self.skips.note(sample.named, reason)
        self.skips.check(self._total)


def read_image(sample: Sample, max_pixels: int = MAX_PIXELS) -> Image:
    """The image of a sample. Raises as `load_image`."""
    return load_image(_content(sample), max_pixels)


def _content(sample: Sample) -> bytes:
    with open(sample.path, "rb") as file:
        file.seek(sample.offset or 0)
        return file.read(-1 if sample.size is None else sample.size)


class Images(Dataset):
    """`[i]` is the preprocessed image of sample i and "", or None and why it cannot be read."""

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Callable[[Image], Tensor],
        max_pixels: int = MAX_PIXELS,
        resize: Resize | None = None,
    ) -> None:
        self.samples, self.preprocess, self.max_pixels, self.resize = samples, preprocess, max_pixels, resize
        self.retried = Retries()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        sample = self.samples[index]
        try:
            content = self.retried(lambda: sample.named, lambda: _content(sample))
            image = load_image(content, self.max_pixels, self.resize)
        except Exception as error:  # PIL has no common class for what a broken file may raise
            raise_lack(error)
            return None, f"{type(error).__name__}: {error}"
        return preprocessed(self.preprocess, image, lambda: sample.named), ""


def readable(images: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    """Of a batch of `Images`: the readable ones [B, C, H, W], in shared memory where a worker calls it, and why each of
    all cannot be read ("" for none)."""
    good = [image for image, reason in images if not reason]
    return default_collate(good) if good else None, [reason for _, reason in images]
