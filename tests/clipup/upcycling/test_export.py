"""torch.export with a dynamic batch size: layers with every option that affects the graph, and text towers."""

import pytest
import torch
from padded_clip import sparse_clip
from torch import nn
from torch.export import Dim

from clipup import SparseMoE
from clipup.clip.inputs import random_inputs

D = 12
OPTIONS = {
    "after_drop": {"normalize_gates": "after_drop", "eval_capacity_factor": 0.5, "priority": True},
    "shared": {"shared_expert": True, "granularity": 2},
    "norm": {"norm": "layer", "gated": True},
    "expert choice": {"routing": "expert_choice", "eval_capacity_factor": 0.7},
    "biased": {"score_function": "sigmoid", "selection_bias": "sign"},
}


class TextTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, texts):
        return self.model.encode_text(texts)


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


@pytest.mark.parametrize("kind", ["gelu"])
def test_exported_text_tower_accepts_any_batch_size(kind):
    tower = TextTower(sparse_clip(kind, blocks=(1,))).eval()
    program = exported(tower, (random_inputs(tower.model, 4)[1],))
    for batch in (1, 7):
        texts = random_inputs(tower.model, batch, seed=batch)[1]
        with torch.no_grad():
            torch.testing.assert_close(program(texts), tower(texts))
