"""pytest-benchmark versions of the key shapes: ``make bench``, or ``pytest benchmarks --benchmark-only``.

Absolute times mean little on a shared machine; they serve to compare two commits on one machine
(``--benchmark-save``, ``--benchmark-compare``). For ratios use moe_forward.py and moe_training.py.
"""

import pytest
import torch
from harness import DTYPES
from moe_layer import Case
from peers import candidates

SHAPES = {
    "vision_b16_8_images": Case(1576, 768, 3072),
    "text_b16_8_captions": Case(616, 512, 2048),
    "one_image": Case(197, 768, 3072),
}
CASES = [(shape, False) for shape in SHAPES] + [("text_b16_8_captions", True)]


@pytest.mark.parametrize("impl", ["dense_k", "loop", "clipup"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "training"), CASES)
def test_speed(benchmark, shape, training, dtype, impl):
    (candidate,) = candidates([impl], SHAPES[shape], 2, DTYPES[dtype], "cpu").values()
    with torch.inference_mode(not training):
        tensors = benchmark.pedantic(candidate.runner(training), warmup_rounds=2, rounds=10)
    assert all(tensor.isfinite().all() for tensor in tensors)
