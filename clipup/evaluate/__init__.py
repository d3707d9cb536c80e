"""Evaluation: retrieval (``evaluate_retrieval``), zero-shot classification (``zero_shot``), and ``datasets``, which
reads COCO, Flickr30k, ImageNet and other benchmarks from disk."""

from ..data.shares import Share
from .datasets import image_folder, read_lines
from .encode import encode_images, encode_texts
from .retrieval import evaluate_retrieval, retrieval
from .zero_shot import zero_shot

__all__ = [
    "Share",
    "encode_images",
    "encode_texts",
    "evaluate_retrieval",
    "image_folder",
    "read_lines",
    "retrieval",
    "zero_shot",
]
