"""torch.export with a dynamic batch size: layers with every option that affects the graph, and text towers."""

import pytest
import torch
from torch.export import Dim

from clipup import SparseMoE

D = 12
OPTIONS = {
    "after_drop": {"normalize_gates": "after_drop", "eval_capacity_factor": 0.5, "priority": True},
    "shared": {"shared_expert": True, "granularity": 2},
    "norm": {"norm": "layer", "gated": True},
    "expert choice": {"routing": "expert_choice", "eval_capacity_factor": 0.7},
    "biased": {"score_function": "sigmoid", "selection_bias": "sign"},
}


def exported(module, inputs):
    batch = Dim("batch", min=1, max=1024)
    return torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs)).module()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exported_layer_accepts_any_batch_size(options):
    layer = SparseMoE(D, 16, num_experts=4, **options).eval()
    program = exported(layer, (torch.randn(4, 5, D), torch.rand(4, 5) > 0.3))
    for batch in (1, 9):
        x, mask = torch.randn(batch, 5, D), torch.rand(batch, 5) > 0.3
        assert torch.equal(program(x, mask), layer(x, mask))
