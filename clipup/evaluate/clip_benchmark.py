"""Registers models of clipup in CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark), as model type "clipup".

    python -m clipup.evaluate.clip_benchmark eval --model_type clipup --model DIR --pretrained "" --dataset ...

is CLIP_benchmark's own command line with this type registered. In Python, importing this module registers it:
``clip_benchmark.models.load_clip("clipup", DIR, "", cache_dir=None, device="cpu")``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..extras import needed_for
from ..models import factory, model_names, tokenizers

with needed_for("CLIP_benchmark's command line", "benchmark"):
    import clip_benchmark.models as registry
    from clip_benchmark import cli
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

MODEL_TYPE = "clipup"


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any, Callable[[list[str]], torch.Tensor]]:
    """Model, transform and tokenizer, in the form that CLIP_benchmark expects.

    Args:
        model_name: as in ``clipup.create_model_and_transforms``: a name, a directory, "hf-hub:ORG/NAME".
        pretrained: tag or file of weights for a name; "" for a directory, which contains its weights.

    Raises:
        ValueError, FileNotFoundError: as ``clipup.create_model_and_transforms``; a name without weights.
    """
    model_names.refuse_random_weights("pretrained", model_name, pretrained)
    model, _, transform = factory.create_model_and_transforms(
        model_name, pretrained or None, device=device, cache_dir=cache_dir
    )
    return model, transform, tokenizers.get_tokenizer(model_name, cache_dir=cache_dir)


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Top-k accuracies for scores [N, C] and classes [N].

    Replaces CLIP_benchmark's function of the same name, which in 1.6.2 converts an array with one element to a float;
    NumPy 2.4 refuses that.
    """
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [hits[:, :k].any(1).double().mean().item() for k in topk]


zeroshot_classification.accuracy = linear_probe.accuracy = accuracy
registry.TYPE2FUNC[MODEL_TYPE] = load
registry.MODEL_TYPES.append(MODEL_TYPE)


if __name__ == "__main__":
    sys.exit(cli.main())
