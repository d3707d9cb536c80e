"""``layer(x, return_routing=True)`` tells where every token went."""

import copy

import torch

import clipup
from clipup import MoEConfig, SparseMoE

D, H = 16, 24


def layer_of(**options):
    torch.manual_seed(0)
    return SparseMoE(D, H, MoEConfig(num_experts=4, top_k=2, **options))


def test_the_output_is_the_gated_sum_over_the_kept_choices():
    layer = layer_of(capacity_factor=0.5).train()
    x = torch.randn(3, 7, D)

    y, routing = layer(x, return_routing=True)

    assert torch.equal(y, layer(x))
    assert routing.gates.shape == routing.experts.shape == routing.kept.shape == (3, 7, 2)
    assert routing.kept.any() and not routing.kept.all()
    expected = torch.zeros_like(x)
    for expert in range(4):
        z = torch.nn.functional.gelu(x @ layer.in_weight[expert].T + layer.in_bias[expert])
        out = z @ layer.out_weight[expert].T + layer.out_bias[expert]
        share = (routing.gates * (routing.experts == expert) * routing.kept).sum(-1, keepdim=True)
        expected += share * out
    torch.testing.assert_close(y, expected)


def test_every_form_of_the_layer_returns_it():
    layer = layer_of(shared_expert=True, capacity_factor=None).eval()
    x = torch.randn(2, 5, D)
    y, routing = layer(x, return_routing=True)
    for other in (
        copy.deepcopy(layer),
        clipup.accelerate(layer),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
    ):
        found, same = other(x, return_routing=True)
        torch.testing.assert_close(found, y)
        assert torch.equal(same.experts, routing.experts) and torch.equal(same.kept, routing.kept)
