"""What int8 weights do to features and retrieval: a model in float32, beside bfloat16 and int8 in either type.

    clipup demo --out runs/demo
    python benchmarks/int8_accuracy.py runs/demo/{clip_up,dense_continued}/model --data 'runs/demo/data/test-*.tar'
    python benchmarks/int8_accuracy.py ViT-B-16                       # random weights: cosines only, on noise

A row is one model in one form (``clipup.accelerate``). Cosines are between its features and those of the plain float32
model; recall is over all images and texts of the data. ``outliers`` makes some channels of the blocks'
inputs 30 times as large and the weights that read them as much smaller: the same function, hard to quantize.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import number, run
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

import clipup
from clipup.clip.inputs import random_inputs
from clipup.data.loaders import load_eval_samples
from clipup.data.options import SourceOptions
from clipup.evaluate.retrieval import retrieval
from clipup.models.factory import create_model_and_transforms, expecting_random_weights
from clipup.models.tokenizers import get_tokenizer

FORMS = {
    "bf16": (torch.bfloat16, None),
    "int8, fp32": (torch.float32, "int8"),
    "int8, bf16": (torch.bfloat16, "int8"),
}
"""The type of the other weights and of activations, and ``weights`` of ``clipup.accelerate``."""
RECALLS = ("text_to_image_R@1", "image_to_text_R@1")
FIELDS = f"model outliers form image_cosine_mean image_cosine_min text_cosine_mean text_cosine_min {' '.join(RECALLS)}"
OUTLIER, OUTLIERS = 30.0, 0.01
"""How much larger the outlying channels are, and the share of channels that are."""


def inputs_of(
    model: nn.Module, name: str, preprocess: object, data: str | None, count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images and texts of one model, and the image of every text; none for noise."""
    if data is None:
        return *random_inputs(model, batch_size=count), None
    samples = [(image, captions) for image, captions, _ in load_eval_samples(data, preprocess, SourceOptions())]
    texts = [caption for _, captions in samples for caption in captions]
    pairs = torch.tensor([row for row, (_, captions) in enumerate(samples) for _ in captions])
    return torch.stack([image for image, _ in samples]), get_tokenizer(name)(texts), pairs


def features(model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    with torch.inference_mode():
        of_images = [model.encode_image(part.to(dtype)).float() for part in images.split(64)]
        of_texts = [model.encode_text(part).float() for part in texts.split(64)]
    return F.normalize(torch.cat(of_images), dim=-1), F.normalize(torch.cat(of_texts), dim=-1)


def load(name: str) -> tuple[nn.Module, object]:
    trained = Path(name).is_dir()
    with expecting_random_weights():
        model, _, preprocess = create_model_and_transforms(name, load_weights=trained)
    return (model if trained else clipup.upcycle(model, clipup.MoEConfig.clip_up())).eval(), preprocess


@torch.no_grad()
def add_outliers(model: nn.Module) -> None:
    """Makes channels between the norms and the projections of open_clip's blocks large; the function stays the same."""
    for block in model.modules():
        if not isinstance(block, ResidualAttentionBlock):
            continue
        mlp = block.mlp
        sparse = isinstance(mlp, clipup.SparseMoE)
        readers = [mlp.in_weight, mlp.router.weight] if sparse else [mlp.c_fc.weight]
        for norm, weights in ((block.ln_1, [block.attn.in_proj_weight]), (block.ln_2, readers)):
            channels = torch.randperm(len(norm.weight))[: max(1, int(OUTLIERS * len(norm.weight)))]
            norm.weight[channels] *= OUTLIER
            norm.bias[channels] *= OUTLIER
            for weight in weights:
                weight[..., channels] /= OUTLIER


def row(
    model: str, outliers: bool, form: str, actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], pairs
) -> dict:
    values = {"model": model, "outliers": int(outliers), "form": form} | dict.fromkeys(RECALLS, "")
    for tower, ours, theirs in zip(("image", "text"), actual, exact, strict=True):
        cosines = (ours * theirs).sum(-1)
        values |= {f"{tower}_cosine_mean": f"{cosines.mean():.5f}", f"{tower}_cosine_min": f"{cosines.min():.5f}"}
    if pairs is not None:
        recall = retrieval(*actual, pairs)
        values |= {name: f"{recall[name]:.4f}" for name in RECALLS}
    return values


def measure(args: argparse.Namespace) -> Iterator[dict]:
    torch.manual_seed(0)
    for name in args.models:
        model, preprocess = load(name)
        data = args.data if Path(name).is_dir() else None
        images, texts, pairs = inputs_of(model, name, preprocess, data, args.count)
        exact = features(model, images, texts)
        label = "/".join(Path(name).parts[-2:])
        for outliers in (False, True):
            if outliers:
                add_outliers(model)
            yield row(label, outliers, "fp32", features(model, images, texts), exact, pairs)
            for form, (dtype, weights) in FORMS.items():
                prepared = clipup.accelerate(copy.deepcopy(model).to(dtype), inplace=True, weights=weights)
                yield row(label, outliers, form, features(prepared, images, texts), exact, pairs)


def main(argv: list[str] | None = None) -> int:
    options = {
        "models": {"nargs": "+", "help": "directories of models, or names: CLIP-UP with random weights"},
        "--data": {"help": "shards or a CSV file for the directories (default: noise)"},
        "--count": number(32, "images and texts of noise"),
    }
    return run(argv, __doc__, options, measure, FIELDS)


if __name__ == "__main__":
    raise SystemExit(main())
