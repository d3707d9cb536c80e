"""Images from files and bytes: which formats are read, how large they may be, and how other modes become RGB."""

from __future__ import annotations

import threading
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485
"""Pixels of an image that is decoded, unless another bound is given: where Pillow warns of a decompression bomb."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, whatever a file is called. Not EPS, for which Pillow starts Ghostscript, an interpreter."""
_FULL_16_BIT = 65_535
_PILLOWS_BOUND = threading.Lock()


def check_max_pixels(pixels: int) -> None:
    if pixels < 1:
        raise ValueError(f"max_image_pixels: got {pixels}, expected at least 1")


def load_image(content: str | bytes, max_pixels: int = MAX_PIXELS) -> Image:
    """An image, decoded whole, RGB, from a path or from its bytes.

    Gray values of 16 bits (modes I;16 and I) and floats are scaled to 8 bits: from 0..65535; from 0..1, or 0..255 where
    a float is above 1.

    Raises ValueError for more than `max_pixels`, before anything is decoded, and for values of an unknown range; else
    what Pillow raises when it is unreadable.
    """
    with _opened(BytesIO(content) if isinstance(content, bytes) else content) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{width} x {height} pixels are more than the {max_pixels} that are decoded (max_image_pixels)"
            )
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _eight_bit(image)
        return image.convert("RGB")


def _opened(file: str | BytesIO) -> Image:
    """The image, of which only the header was read. Pillow's own bound, which is one for the process, is lifted."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with _PILLOWS_BOUND:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ValueError(f"it is no image, or of no format that is read ({', '.join(formats)})") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _eight_bit(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        full = 1 if high <= 1 else 255
    else:
        full = _FULL_16_BIT
    if not (low >= 0 and high <= full):
        raise ValueError(f"its values range from {low} to {high}, expected 0 to {full}")
    return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8))
