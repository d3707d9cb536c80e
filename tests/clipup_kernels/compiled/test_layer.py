"""A whole layer on Triton's kernels as compiled for sm_80: a training step and inference against float64."""

import copy

import pytest
import torch
from moe_cases import assert_follows, randn

import clipup

pytestmark = pytest.mark.compiled
LAYERS = {
    "plain": {"activation": "gelu"},
    "gated, masked and limited": {"activation": "silu", "gated": True, "capacity_factor": 1.0, "priority": True},
    "biased choice beside a shared expert": {"selection_bias": "sign", "shared_expert": True},
}


def step(layer, x, mask):
    """Output, losses and gradients of a training step, and the output of inference."""
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    losses = clipup.aux_loss(layer)
    incoming = randn(y.numel(), seed=3).view_as(y).to(y)
    ((y * incoming).sum() + losses).backward()
    found = {"y": y.detach(), "losses": losses.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    with torch.inference_mode():
        return found | {"inference": copy.deepcopy(layer).eval()(x.detach(), mask)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_layer_trains_and_infers_on_compiled_kernels(request, options, dtype):
    torch.manual_seed(0)
    layer = clipup.SparseMoE(32, 48, num_experts=4, top_k=2, balance_weight=0.01, z_weight=0.01, **options).to(dtype)
    x, mask = randn(2, 37, 32, dtype=dtype, seed=1), torch.arange(37).expand(2, 37) < torch.tensor([[37], [20]])
    oracle = step(copy.deepcopy(layer).double(), x.double(), mask)
    with request.getfixturevalue("executing")() as driver:  # from here on, Triton computes CPU tensors
        ours = step(layer, x, mask)
    assert {"_gating", "_count", "_assign", "_project_in", "_project_rows"} <= driver.launched.keys()
    for name, value in ours.items():
        assert_follows(value, oracle[name], dtype, name)
