"""Packed copies of weights: faster inference that nobody notices otherwise."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from moe_cases import DTYPES, SHAPES, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels.cpu import backend

pytestmark = pytest.mark.skipif(
    backend("expert_mlp_forward", torch.float32).__name__ != "clipup_kernels.native",
    reason="packed weights are for the compiled kernels",
)


@pytest.fixture(autouse=True)
def nothing_kept():
    ck.release_memory()
    yield
    ck.pack_weights(True)
    ck.release_memory()


def packed_bytes() -> int:
    return ck.backend_info()["packed_weights"]["bytes"]


class Layer:
    """A call of expert_mlp with everything fixed but the weights."""

    def __init__(self, dtype=torch.float32, gated=False):
        shape = SHAPES["odd"]
        self.gates, self.plan = route(shape)
        self.x = randn(shape.tokens, shape.width, dtype=dtype, seed=1)
        self.experts = make_experts(shape, dtype, "gelu", True, gated, 2)

    def __call__(self):
        return ck.expert_mlp(self.x, self.gates, self.plan, *self.experts)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_same_bits(dtype, gated):
    if backend("expert_mlp_forward", dtype).__name__ != "clipup_kernels.native":
        pytest.skip("this type takes torch's matmul here")
    layer = Layer(dtype, gated)
    first = layer()
    assert packed_bytes() == 0
    second = layer()
    assert packed_bytes() > 0
    third = layer()
    assert torch.equal(first, second) and torch.equal(first, third)


def test_grouped_linear_keeps_its_weight_packed_too():
    layer = Layer()
    rows = ck.permute(layer.x, layer.plan)
    weight, bias = layer.experts.in_weight, layer.experts.in_bias
    results = [ck.grouped_linear(rows, weight, bias, layer.plan.offsets) for _ in range(3)]
    assert packed_bytes() > 0
    assert all(torch.equal(results[0], result) for result in results)
    weight.requires_grad_()
    ck.grouped_linear(rows, weight, bias, layer.plan.offsets).sum().backward()
    assert packed_bytes() == 0


@pytest.mark.parametrize("write", ["in place", "through .data", "new storage"])
def test_a_written_weight_is_packed_again(write):
    layer = Layer()
    stale = [layer() for _ in range(3)][-1]
    weight = layer.experts.in_weight
    if write == "in place":
        weight.mul_(2)
    elif write == "through .data":
        weight.data.mul_(2)
    else:
        weight.data = weight.data * 2
    fresh = [layer() for _ in range(3)]
    ck.pack_weights(False)
    assert not torch.equal(fresh[0], stale)
    assert all(torch.equal(y, layer()) for y in fresh)


def test_training_keeps_no_packed_weights():
    layer = Layer()
    layer(), layer()
    assert packed_bytes() > 0
    layer.experts.in_weight.requires_grad_()
    layer.experts.out_weight.requires_grad_()
    for _ in range(3):
        layer().sum().backward()
    assert packed_bytes() == 0


def test_the_copy_goes_with_its_weight():
    layer = Layer()
    layer(), layer()
    assert packed_bytes() > 0
    del layer
    gc.collect()
    assert packed_bytes() == 0


def test_weights_without_a_version_are_not_kept():
    with torch.inference_mode():
        layer = Layer()
        [layer() for _ in range(3)]
    assert packed_bytes() == 0


def test_compiled_models_use_packed_weights_too():
    layer = Layer()
    run = torch.compile(lambda x, *experts: ck.expert_mlp(x, layer.gates, layer.plan, *experts, "gelu"), fullgraph=True)
    tensors = [t for t in layer.experts if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        results = [run(layer.x, *tensors) for _ in range(3)]
    assert packed_bytes() > 0
    assert all(torch.equal(y, layer()) for y in results)


def test_packing_can_be_turned_off():
    ck.pack_weights(False)
    layer = Layer()
    [layer() for _ in range(3)]
    info = ck.backend_info()["packed_weights"]
    assert info == {"enabled": False, "bytes": 0}


def test_the_environment_turns_packing_off():
    code = "import clipup_kernels as ck; print(ck.backend_info()['packed_weights'])"
    env = os.environ | {"CLIPUP_PACK_WEIGHTS": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "{'enabled': False, 'bytes': 0}"
