import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

LAYERS = ("visual.transformer.resblocks.1.mlp", "visual.transformer.resblocks.3.mlp", "transformer.resblocks.1.mlp")


def recall(way, r1):
    return {f"{way}_R@1": r1, f"{way}_R@5": 1.9 * r1, f"{way}_R@10": 2.4 * r1}


def arm(to_image, to_text, steps, seconds, params, active, gflops):
    def measured(share, gallery):
        found = recall("text_to_image", share * to_image) | recall("image_to_text", share * to_text)
        return {**found, "chance_R@1": 1 / gallery, "gallery": gallery, "captions": 3 * gallery}

    costs = {"steps": steps, "seconds": seconds, "params": params, "active_params": active, "gflops_per_pair": gflops}
    return {**costs, **measured(1, 1012), "splits": {"emoji": measured(1.2, 402), "concepts": measured(0.6, 894)}}


def make_report(to_image=0.2433, to_text=0.2461):
    """What report.json holds; the dense baseline (continued training) has 0.231 and 0.239."""
    return {
        "data": {"name": "pictograms", "train_pairs": 11873, "test_images": 1012, "test_captions": 3988},
        "chance_R@1": 1 / 1012,
        "dense": arm(0.178, 0.185, 0, 0.0, 843_521, 843_521, 0.01234),
        "upcycled_step0": {
            **arm(0.178, 0.185, 0, 0.0, 1_772_033, 1_013_345, 0.01633),
            "max_feature_difference": 2.98e-7,
        },
        "dense_continued": arm(0.231, 0.239, 400, 58.4, 843_521, 843_521, 0.01234),
        "clip_up": arm(to_image, to_text, 400, 78.0, 1_772_033, 1_013_345, 0.01633),
        "options": {"seed": 0},
        "moe_cfg": {"num_experts": 8, "blocks": {"image": [1, 3]}},
        "machine": {"processor": "Abacus-7", "threads": 2},
    }


def make_inputs(report):
    """Everything that render_demo takes, as keywords."""
    rng = np.random.default_rng(0)

    def curve():
        loads = rng.dirichlet(np.full(8, 40.0), 400).tolist()
        return [
            {
                "step": i + 1,
                "contrastive": 1.4 + math.exp(-i / 50),
                "layers": {layer: {"load": load} for layer in LAYERS},
            }
            for i, load in enumerate(loads)
        ]

    def evaluations():
        return [
            {"step": step, "text_to_image_R@1": step / 5000, "image_to_text_R@1": step / 4800}
            for step in range(100, 401, 100)
        ]

    def picture():
        return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def retrieval(rank):
        shown = {"caption": "smiling cat", "target": picture(), "rank": rank}
        return {**shown, "retrieved": [picture() for _ in range(5)]}

    return {
        "report": report,
        "curves": {arm: curve() for arm in ("dense_continued", "clip_up")},
        "evaluations": {arm: evaluations() for arm in ("dense_continued", "clip_up")},
        "routing": [
            {
                "image": picture(),
                "caption": "potted plant",
                "layers": {layer: rng.integers(0, 8, (4, 4)) for layer in LAYERS[:2]},
            }
        ],
        "retrievals": {"best": [retrieval(1)], "worst": [retrieval(871)]},
        "dataset": {
            "splits": {"test": {"images": 1012, "captions": 3988}},
            "rules": {
                "test": "one rendering is held out",
                "left_out": "drawings nearly in the test split",
            },
            "sources": [
                {"gives": "Drawings", "licence": "CC-BY-4.0", "made_by": "A. Painter", "url": "https://example.org/"}
            ],
        },
    }


@pytest.fixture
def inputs():
    return make_inputs(make_report())


@pytest.fixture
def make():
    return SimpleNamespace(report=make_report, inputs=make_inputs)
