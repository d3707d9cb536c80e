"""Evaluation: retrieval (``evaluate_retrieval``), zero-shot classification (``zero_shot``), and readers of COCO,
Flickr30k, ImageNet and other benchmarks on disk (``datasets``)."""

from .encode import encode_images, encode_texts
from .labelled_images import image_folder, read_lines
from .retrieval import evaluate_retrieval, retrieval
from .shares import Share
from .zero_shot import zero_shot, zero_shot_classifier

__all__ = [
    "Share",
    "encode_images",
    "encode_texts",
    "evaluate_retrieval",
    "image_folder",
    "read_lines",
    "retrieval",
    "zero_shot",
    "zero_shot_classifier",
]
