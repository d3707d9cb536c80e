"""Builds the characters data set (`python -m studies characters OUT`): characters as typefaces of Debian packages draw
them, black on white, with their definitions in English as captions.

    OUT/train-*.tar             U+CODE/TYPEFACE.png, .txt (the definition)
    OUT/validation-*.tar        the same and .json; typefaces that are not trained on
    OUT/test_typefaces-*.tar    the same; other ones
    OUT/vectors.safetensors     the definitions' embeddings, and the definitions (``fixed_texts``)
    OUT/licences/PACKAGE        what the package says of makers and licences
    OUT/dataset.json, sizes.json

The .json is `{"captions": [...], "group": TYPEFACE}`. Equal definitions are one caption. The same packages, options and
libraries give the same bytes, but for the last bits of the embeddings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from clipup.progress import progress as shown

from .. import data_set, fixed_texts
from ..data_set import Sample
from ..icon_data.splits import order
from ..sentence_encoder import read_sentence_encoder
from . import definitions

FORMAT = 1
"""Incremented when the same packages and options give a different data set."""
SIDE, _POINTS = 32, 28  # pixels
_DEFINITIONS = "unicode-data"
_TYPEFACES = Path(__file__).with_name("typefaces.json")
_SHOWS = 100  # a smaller range of gray levels, out of 255, is no character


def packages() -> list[str]:
    """The Debian packages that the data set needs."""
    return sorted({_DEFINITIONS, *(path.split("/")[0] for paths in _typefaces().values() for path in paths)})


def build(
    out: Path,
    unpacked: Path,
    encoder: Path,
    meanings: int,
    seed: int = 0,
    overwrite: bool = False,
    typefaces: Path | None = None,
) -> dict:
    """Builds the data set in ``out``, or reuses it if it exists, and returns the content of its ``dataset.json``.

    Args:
        unpacked: a directory with a directory of each of the ``packages``, into which it is unpacked.
        encoder: the package of the sentence encoder (``studies.sentence_encoder``).
        meanings: definitions to take: those that the most glyphs of training typefaces have.
        seed: of the order in the training shards.
        typefaces: a JSON file with ``PACKAGE/FILE`` of the typefaces of each split, instead of this package's own.

    Raises:
        FileNotFoundError: a package is missing in ``unpacked``.
        ValueError: ``out`` holds something else, which is left unchanged; another package than the sentence encoder's.
    """
    given = _typefaces(typefaces)
    options = {"meanings": meanings, "seed": seed, "size": SIDE} | ({"typefaces": given} if typefaces else {})
    fonts = {split: [_file(unpacked, path) for path in paths] for split, paths in given.items()}
    readings = unpacked / _DEFINITIONS
    source = {
        "definitions": hashlib.sha256((readings / definitions.FILE).read_bytes()).hexdigest(),
        "typefaces": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for of in fonts.values() for path in of},
        "pillow": PIL.__version__,
    }

    def make(directory: Path) -> dict:
        meaning_of = definitions.read_definitions(readings)
        drawn = {
            split: [glyph for path in paths for glyph in _glyphs(path, meaning_of)] for split, paths in fonts.items()
        }
        taken = _most_drawn(drawn["train"], meanings)
        splits = {}
        for split, glyphs in drawn.items():
            glyphs = [glyph for glyph in glyphs if glyph.caption in taken]
            shuffled = (glyphs[row] for row in order([glyph.key for glyph in glyphs], seed))
            written = data_set.write_split(directory, split, shuffled)
            splits[split] = written | {"typefaces": [path.name for path in fonts[split]]}
        texts = sorted(taken)
        fixed_texts.save(directory, texts, fixed_texts.embed(texts, *read_sentence_encoder(encoder)))
        (directory / "licences").mkdir()
        for package in packages():
            (said,) = (unpacked / package / "usr/share/doc").glob("*/copyright")
            shutil.copyfile(said, directory / "licences" / package)
        return {"splits": splits}

    return data_set.build(out, "characters", FORMAT, source, options, overwrite, make)


def _typefaces(path: Path | None = None) -> dict[str, list[str]]:
    """``PACKAGE/FILE`` of the typefaces of each split. None is a copy: of 400 common characters, two draw at most 6 %
    with a correlation above 0.95, and copies 20 % and more."""
    return json.loads((path or _TYPEFACES).read_text("utf-8"))


def _file(unpacked: Path, path: str) -> Path:
    package, name = path.split("/")
    files = sorted((unpacked / package).rglob(name))
    if not files:
        raise FileNotFoundError(
            f"packages: {unpacked} has no {package} with {name}; get it with `apt-get download {package}` and "
            f"`dpkg -x {package}_*.deb {unpacked}/{package}`"
        )
    return files[0]


def _glyphs(path: Path, meaning_of: dict[str, str]) -> Iterator[Sample]:
    """The characters with a definition that a typeface draws, in the order of their codes."""
    font = ImageFont.truetype(str(path), _POINTS)
    missing = _drawn(font, "\uffff")
    for character, meaning in shown(sorted(meaning_of.items()), path.name, "characters", show=True):
        picture = _drawn(font, character)
        if picture is not None and picture != missing:
            yield Sample(f"U+{ord(character):04X}/{path.stem}", picture, meaning, path.stem)


def _drawn(font: FreeTypeFont, character: str) -> bytes | None:
    """A centered PNG; None if the typeface draws nothing."""
    left, top, right, bottom = font.getbbox(character)
    picture = Image.new("L", (SIDE, SIDE), 255)
    place = (SIDE - right - left) / 2, (SIDE - bottom - top) / 2
    ImageDraw.Draw(picture).text(place, character, fill=0, font=font)
    if np.ptp(np.asarray(picture)) < _SHOWS:
        return None
    return data_set.png(picture)


def _most_drawn(glyphs: list[Sample], count: int) -> set[str]:
    numbers = Counter(sorted(glyph.caption for glyph in glyphs))  # of equal numbers the first by name
    return {meaning for meaning, _ in numbers.most_common(count)}
