"""Small data sets of noise pictures in the layouts of the real benchmarks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy
from PIL import Image

WORDS = "cat dog sun sea tree house road boat bird fish man woman child red blue old small big near under".split()
CAPTIONS = 5


def picture(seed: int) -> Image.Image:
    """Coarse noise, which JPEG preserves."""
    noise = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(noise).resize((40, 30), Image.Resampling.NEAREST)


def caption(seed: int) -> str:
    """Words with a comma, as in real captions."""
    words = numpy.random.default_rng(seed).choice(WORDS, 6)
    return f"{' '.join(words[:3])}, {' '.join(words[3:])}."


def captions(image: int) -> list[str]:
    return [caption(1000 * image + number) for number in range(CAPTIONS)]


def coco(root: Path, images: int = 12) -> Path:
    """val2014 and coco_test_karpathy.json, as in CLIP_benchmark; ids are not sorted."""
    (root / "val2014").mkdir(parents=True)
    ids = [int(id) for id in numpy.random.default_rng(images).permutation(images) + 391895]
    listed, annotations = [], []
    for number, id in enumerate(ids):
        name = f"COCO_val2014_{id:012d}.jpg"
        picture(number).save(root / "val2014" / name)
        listed.append({"id": id, "file_name": name, "height": 30, "width": 40})
        annotations += [{"image_id": id, "id": 10 * id + n, "caption": c} for n, c in enumerate(captions(number))]
    (root / "coco_test_karpathy.json").write_text(json.dumps({"images": listed, "annotations": annotations[::-1]}))
    return root


def karpathy(root: Path, name: str, images: int = 12) -> None:
    """Karpathy's JSON for the pictures of ``coco`` or ``flickr30k``: half are test, half restval."""
    folder = "val2014" if name == "dataset_coco.json" else ""
    files = sorted((root / folder).glob("*.jpg"))[:images]
    listed = []
    for number, file in enumerate(files):
        split = "test" if number % 2 == 0 else "restval"
        sentences = [{"raw": text, "tokens": text.split()} for text in captions(number)]
        entry = {"filename": file.name, "imgid": number, "split": split, "sentences": sentences}
        listed.append({**entry, "filepath": folder} if folder else entry)
    (root / name).write_text(json.dumps({"images": listed, "dataset": name}))


def flickr30k(root: Path, images: int = 12) -> Path:
    """Pictures and flickr30k_test_karpathy.txt in one directory, as in CLIP_benchmark."""
    root.mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(images):
        picture(number).save(root / f"{1007129816 + number}.jpg")
        lines += [f"{1007129816 + number}.jpg,{text}" for text in captions(number)]
    (root / "flickr30k_test_karpathy.txt").write_text("\n".join(lines) + "\n")
    return root


def imagenet(root: Path, classes: int = 1000) -> Path:
    """val with one directory per WordNet id; every hundredth has a picture."""
    for number in range(classes):
        folder = root / "val" / f"n{1440764 + number:08d}"
        folder.mkdir(parents=True)
        if number % 100 == 0:
            picture(number).save(folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
    return root


def imagenet_v2(root: Path, classes: int = 1000) -> Path:
    """One directory per class, named by its index; every hundredth has a picture."""
    for number in range(classes):
        folder = root / "imagenetv2-matched-frequency-format-val" / str(number)
        folder.mkdir(parents=True)
        if number % 100 == 0:
            picture(number).save(folder / "0a1b2c.jpeg")
    return root


def webdataset(root: Path, retrieval: bool, images: int = 12, shards: int = 2) -> Path:
    """test/0.tar ... with test/nshards.txt, as CLIP_benchmark's clip_benchmark_export_wds writes them."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, images, shards):
                content = io.BytesIO()
                picture(number).save(content, "WEBP")
                _add(tar, f"s{number:07d}.webp", content.getvalue())
                if retrieval:
                    _add(tar, f"s{number:07d}.txt", "\n".join(captions(number)).encode())
                else:
                    _add(tar, f"s{number:07d}.cls", str(number % 3).encode())
    if retrieval:
        (root / "dataset_type.txt").write_text("retrieval")
    else:
        (root / "classnames.txt").write_text("cat\ndog\nsea\n")
        (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
