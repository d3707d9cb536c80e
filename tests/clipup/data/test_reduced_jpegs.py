"""Images decoded at a smaller scale and resized by ``load_image``, beside those decoded and resized in full."""

import numpy as np
import pytest
from picture_samples import encoded
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.v2 import functional

from clipup.data.evaluation import EvalSamples
from clipup.data.image_files import image_files
from clipup.data.images import load_image, resize_of, upright
from clipup.data.skips import Skips

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def photo(width, height):
    """Detail of all sizes, as photographs have it."""
    generator, levels = np.random.default_rng(width * height), np.zeros((height, width, 3))
    for size in (4, 16, 64, 256):
        noise = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
        levels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / 4
    return Image.fromarray(levels.round().astype(np.uint8))


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=90)


KINDS = {
    "baseline": lambda image: encoded(image, "JPEG", quality=90),
    "progressive": lambda image: encoded(image, "JPEG", quality=90, progressive=True),
    "without subsampling": lambda image: encoded(image, "JPEG", quality=90, subsampling=0),
    "gray": lambda image: encoded(image.convert("L"), "JPEG"),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "on its side": turned,
    "several in a file": lambda image: encoded(image, "MPO", save_all=True, append_images=[image]),
    "PNG": lambda image: encoded(image, "PNG"),
    "WebP": lambda image: encoded(image, "WEBP", quality=90),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(504, 376), (503, 377), (320, 600), (60, 41)])
@pytest.mark.parametrize("resize", [Resize(64, BICUBIC), Resize((64, 64), BICUBIC), Resize([48], BILINEAR)], ids=str)
def test_every_kind_of_picture_is_nearly_the_same(kind, size, resize):
    file = KINDS[kind](photo(*size))
    whole = resize(upright(load_image(file)))
    small = upright(load_image(file, resize=resize_of(Compose([resize, CenterCrop(48)]))))
    assert resize(small) is small and (small.mode, small.size) == ("RGB", whole.size)
    difference = np.abs(np.asarray(whole, float) - np.asarray(small, float))
    reduced = kind not in ("PNG", "WebP") and min(size) > 100
    assert difference.mean() < (1 if reduced else 0.3), difference.mean()
    assert difference.max() <= (8 if reduced else 2), difference.max()


@pytest.mark.parametrize(
    "size, side, divided",
    [
        *(((640, 480), 60, 4), ((640, 480), 61, 2), ((1000, 480), 30, 8)),
        *(((642, 482), 30, 2), ((641, 479), 30, 1), ((480, 640), 121, 1)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_whole_scale_with_twice_the_pixels(monkeypatch, size, side, divided):
    decoded, resize = [], functional.resize

    def spy(pixels, *args, **options):
        decoded.append(pixels.shape)
        return resize(pixels, *args, **options)

    monkeypatch.setattr(functional, "resize", spy)
    content = encoded(photo(*size), "JPEG")
    load_image(content, resize=Resize(side, BICUBIC))
    assert decoded == [(3, size[1] // divided, size[0] // divided)]
    assert load_image(content).size == size


@pytest.mark.parametrize(
    "preprocess", [Compose([CenterCrop(8)]), Compose([Resize((8, 4))]), Compose([Resize(8, max_size=9)]), len]
)
def test_only_transforms_that_resize_to_a_side_or_a_square_get_reduced_images(preprocess):
    assert resize_of(preprocess) is None


def test_a_stored_orientation_is_ignored_as_by_open_clip():
    assert load_image(turned(photo(64, 32))).size == (64, 32)


def test_evaluations_decode_in_full(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encoded(photo(640, 480), "JPEG"))
    sizes = []
    for resize in (None, Resize(30)):
        samples = EvalSamples(
            image_files(tmp_path), lambda image: sizes.append(image.size) or 0, Skips(), resize=resize
        )
        assert len(list(samples.only(samples.samples).batches(1))) == 1
    assert sizes == [(640, 480), (40, 30)]
