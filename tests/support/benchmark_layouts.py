"""Small data sets of noise pictures in the layouts of the real benchmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy
from PIL import Image
from webdataset import TarWriter

WORDS = "cat dog sun sea tree house road boat bird fish man woman child red blue old small big near under".split()


def picture(seed: int) -> Image.Image:
    """Coarse noise, which JPEG preserves."""
    noise = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(noise).resize((40, 30), Image.Resampling.NEAREST)


def captions(image: int) -> list[str]:
    """Five, of words with a comma, as in real captions."""
    words = numpy.random.default_rng(1000 * image).choice(WORDS, (5, 6))
    return [f"{' '.join(of[:3])}, {' '.join(of[3:])}." for of in words]


def coco(root: Path, images: int = 12) -> Path:
    """val2014 and coco_test_karpathy.json, as in CLIP_benchmark; ids are not sorted."""
    (root / "val2014").mkdir(parents=True)
    ids = [int(id) for id in numpy.random.default_rng(images).permutation(images) + 391895]
    names = [f"COCO_val2014_{id:012d}.jpg" for id in ids]
    for number, name in enumerate(names):
        picture(number).save(root / "val2014" / name)
    listed = [{"id": id, "file_name": name, "height": 30, "width": 40} for id, name in zip(ids, names, strict=True)]
    annotations = [
        {"image_id": id, "id": 10 * id + n, "caption": caption}
        for number, id in enumerate(ids)
        for n, caption in enumerate(captions(number))
    ]
    (root / "coco_test_karpathy.json").write_text(json.dumps({"images": listed, "annotations": annotations[::-1]}))
    return root


def karpathy(root: Path, name: str, images: int = 12) -> None:
    """Karpathy's JSON for the pictures of ``coco`` or ``flickr30k``: half are test, half restval."""
    folder = {"filepath": "val2014"} if name == "dataset_coco.json" else {}
    listed = [
        {
            "filename": file.name,
            "imgid": number,
            "split": "restval" if number % 2 else "test",
            "sentences": [{"raw": text, "tokens": text.split()} for text in captions(number)],
            **folder,
        }
        for number, file in enumerate(sorted(root.joinpath(*folder.values()).glob("*.jpg"))[:images])
    ]
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
    return _classes(root, "val/n{0:08d}", "ILSVRC2012_val_{0:08d}.JPEG", range(1440764, 1440764 + classes))


def imagenet_v2(root: Path, classes: int = 1000) -> Path:
    """One directory per class, named by its index; every hundredth has a picture."""
    return _classes(root, "imagenetv2-matched-frequency-format-val/{0}", "0a1b2c.jpeg", range(classes))


def _classes(root: Path, folder: str, name: str, classes: range) -> Path:
    for number, label in enumerate(classes):
        path = root / folder.format(label)
        path.mkdir(parents=True)
        if number % 100 == 0:
            picture(number).save(path / name.format(number + 1))
    return root


def webdataset(root: Path, retrieval: bool, images: int = 12, shards: int = 2) -> Path:
    """test/0.tar ... with test/nshards.txt, as CLIP_benchmark's clip_benchmark_export_wds writes them."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        with TarWriter(str(root / "test" / f"{shard}.tar")) as tar:
            for number in range(shard, images, shards):
                picture(number).save(content := io.BytesIO(), "WEBP")
                known = {"txt": "\n".join(captions(number))} if retrieval else {"cls": str(number % 3)}
                tar.write({"__key__": f"s{number:07d}", "webp": content.getvalue(), **known})
    kind = {"dataset_type.txt": "retrieval"}
    classes = {"classnames.txt": "cat\ndog\nsea\n"}
    classes["zeroshot_classification_templates.txt"] = "a photo of a {c}.\nthe {c}\n"
    for name, text in (kind if retrieval else classes).items():
        (root / name).write_text(text)
    return root
