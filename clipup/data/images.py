"""Decoding of images: allowed formats, largest size, and conversion of all modes to RGB."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from .skips import raise_lack

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torchvision.transforms import Resize

MAX_PIXELS = 89_478_485
"""Default for the largest image to decode, in pixels: where Pillow warns of a decompression bomb."""

MAX_ASPECT_RATIO = 200
"""Largest ratio of an image's longer side to its shorter side. Transforms resize the shorter side to that of
the model: without a limit, a file of some kilobytes would take gigabytes."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""Decoded formats, whatever the file extension. Not EPS: Pillow runs it in Ghostscript, an interpreter."""
_SPARE = 2
"""A JPEG is decoded to at least this many times the target's pixels on each side. With 2, resized photographs differ by
0.3 of 255 levels on average from those decoded in full, with 1.5 by 0.5, with 1 by 0.9; bilinear ones do by 1.0."""
_FULL_16_BIT = 65_535
_PILLOWS_BOUND = threading.Lock()


def load_image(content: str | bytes, max_pixels: int = MAX_PIXELS, resize: Resize | None = None) -> Image:
    """An image, decoded to RGB, from a path or from its bytes.

    With `resize`, it is resized as by that transform, in less time: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size
    where that is whole and leaves `_SPARE` times the pixels on both sides, and torch's resize is faster than Pillow's.

    16-bit gray values (modes I;16 and I) are scaled to 8 bits from 0..65535, floats from 0..1, or from 0..255 if any is
    above 1.

    Raises ValueError for more than `max_pixels` or a longer shape than `MAX_ASPECT_RATIO`, before decoding, and for
    values out of range; otherwise what Pillow raises for unreadable images.
    """
    with _opened(BytesIO(content) if isinstance(content, bytes) else content) as image:
        width, height = image.size
        for exceeds, limit in (
            (width * height > max_pixels, f"{max_pixels} (max_image_pixels)"),
            (max(image.size) > MAX_ASPECT_RATIO * min(image.size), f"{MAX_ASPECT_RATIO}:1 on the shape"),
        ):
            if exceeds:
                raise ValueError(f"its {width} x {height} pixels exceed the limit of {limit}")
        if resize is not None:
            _decode_smaller(image, resize)
        image = to_rgb(image).copy()  # read before the file is closed
        return image if resize is None else _resized(image, resize)


def to_rgb(image: Any) -> Any:
    """An image of PIL in RGB, with the ranges of ``load_image``. Anything else is returned as it is.

    It comes before all other steps of a transform. PIL resizes palettes and single bits to the nearest pixel, colors
    under transparency by other weights, and cuts 16 bits at 255.
    """
    mode = getattr(image, "mode", "RGB")
    image = _eight_bit(image) if mode in ("I", "F") or mode.startswith("I;16") else image
    return image if mode == "RGB" else image.convert("RGB")


def resize_of(preprocess: Callable[[Image], Tensor]) -> Resize | None:
    """The first step of a transform after ``to_rgb``, if it resizes to a shorter side or to a square: then images may
    be turned after it."""
    from torchvision.transforms import Resize

    first = next((step for step in getattr(preprocess, "transforms", ()) if step is not to_rgb), None)
    if not isinstance(first, Resize) or first.max_size is not None:
        return None
    return first if isinstance(first.size, int) or len({*first.size}) == 1 else None


def upright(image: Image) -> Image:
    """The image, turned as its EXIF orientation says; unchanged without one, or with damaged EXIF data."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # PIL has no common class for what damaged data may raise
        return image


def read_sample(
    read: Callable[[], tuple[bytes, list[str]]],
    name: Callable[[], str],
    preprocess: Callable[[Image], Tensor],
    max_pixels: int,
    skip: Callable[[str, str], None],
    resize: Resize | None = None,
) -> tuple[Tensor, list[str]] | None:
    """The preprocessed image of a sample, and its captions; None if they cannot be read.

    Args:
        read: gives the content of the image's file, and the captions.
        name: gives the sample's name in messages.
        skip: called with name and reason of a sample that cannot be read.

    Raises what ``raise_lack`` raises, and ValueError, naming the sample, for an error of ``preprocess``.
    """
    try:
        content, captions = read()
        image = load_image(content, max_pixels, resize)
    except Exception as error:  # PIL has no common class for what a broken file may raise
        raise_lack(error)
        skip(name(), f"{type(error).__name__}: {error}")
        return None
    try:
        return preprocess(image), captions
    except Exception as error:
        raise_lack(error)
        raise ValueError(f"{type(error).__name__}: {error} (preprocess of {name()})") from error


@cache
def decodes_heic() -> bool:
    """Whether pi_heif, an extra, is installed; Pillow then knows its format."""
    try:
        import pi_heif
    except ModuleNotFoundError:
        return False
    pi_heif.register_heif_opener()
    return True


def _opened(file: str | BytesIO) -> Image:
    """The image, of which only the header is read. Pillow's own size limit, global to the process, is lifted."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    decodes_heic()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with _PILLOWS_BOUND:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ValueError(f"it is not an image of a supported format ({', '.join(formats)})") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode_smaller(image: Image, resize: Resize) -> None:
    """Lets a JPEG be decoded at the smallest scale that leaves enough pixels. It divides both sides, because a last
    pixel that lies partly outside would shift the resized image."""
    side = resize.size if isinstance(resize.size, int) else resize.size[0]
    width, height = image.size
    for scale in (8, 4, 2):
        if width % scale == height % scale == 0 and min(width, height) >= scale * _SPARE * side:
            image.draft(None, (width // scale, height // scale))  # nothing for other formats
            return


def _resized(image: Image, resize: Resize) -> Image:
    """An RGB image, resized by torch."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.transforms.v2 import functional

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = functional.resize(pixels, resize.size, resize.interpolation, antialias=True)
    resized = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    resized.info = image.info  # with its EXIF orientation
    return resized


def _eight_bit(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    full = _FULL_16_BIT if image.mode != "F" else 1 if high <= 1 else 255
    if not (low >= 0 and high <= full):
        raise ValueError(f"its values range from {low} to {high}, expected 0 to {full}")
    return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8))
