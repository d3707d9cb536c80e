"""pytest-benchmark versions of the key shapes: ``make bench``, or ``pytest benchmarks --benchmark-only``.

Absolute times mean little on a shared machine; they serve to compare two commits on one machine
(``--benchmark-save``, ``--benchmark-compare``). For ratios use moe_forward.py and moe_training.py.
"""

import pytest
import torch
from baselines import IMPLEMENTATIONS, make_weights, make_x

SHAPES = {
    "vision_b16_8_images": (1576, 768, 3072),
    "text_b16_8_captions": (616, 512, 2048),
    "one_image": (197, 768, 3072),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("impl", ["dense_k", "loop", "clipup"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(benchmark, shape, dtype, impl):
    tokens, d_model, d_hidden = shape
    weights = make_weights(d_model, d_hidden, 8, 2, dtype)
    x = make_x(tokens * (2 if impl == "dense_k" else 1), d_model, dtype)
    with torch.inference_mode():
        y = benchmark(IMPLEMENTATIONS[impl], x, weights)
    assert y.shape == x.shape and y.isfinite().all()


@pytest.mark.parametrize("impl", ["dense_k", "loop", "clipup"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_forward_and_backward(benchmark, dtype, impl):
    tokens, d_model, d_hidden = SHAPES["text_b16_8_captions"]
    weights = make_weights(d_model, d_hidden, 8, 2, dtype)
    weights = weights._replace(**{n: getattr(weights, n).requires_grad_() for n in weights._fields[1:5]})
    x = make_x(tokens * (2 if impl == "dense_k" else 1), d_model, dtype).requires_grad_()
    leaves = [x, *weights[1:5]]

    def step():
        y = IMPLEMENTATIONS[impl](x, weights)
        return torch.autograd.grad(y, leaves, y.detach())

    gradients = benchmark(step)
    assert all(gradient.isfinite().all() for gradient in gradients)
