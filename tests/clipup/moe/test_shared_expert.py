"""The shared expert: every token takes it, and an upcycled layer starts as the dense MLP."""

import pytest
import torch
from tiny_clip import tiny_clip

from clipup import (
    MoEConfig,
    SparseMoE,
    moe_layers,
    step0_difference,
    upcycle,
)
from clipup.clip.flops import count

D, H, E, K = 12, 20, 4, 2
CONFIG = MoEConfig.clip_up(num_experts=4, shared_expert=True, towers=("image", "text"))


def make_layer(**options):
    torch.manual_seed(0)
    layer = SparseMoE(D, H, **{"num_experts": E, "top_k": K, "shared_expert": True, **options})
    with torch.no_grad():
        layer.router.weight.mul_(30)
    return layer


def parts(layer):
    """The routed experts, and the shared one as a layer of one expert."""
    options = {"gated": layer.gate_weight is not None, "bias": layer.in_bias is not None}
    routed = SparseMoE(D, layer.d_hidden, num_experts=E, top_k=K, **options)
    alone = SparseMoE(D, layer.shared.d_hidden, num_experts=1, top_k=1, **options)
    state = layer.state_dict()
    routed.load_state_dict({name: value for name, value in state.items() if not name.startswith("shared.")})
    shared = {name.removeprefix("shared."): value for name, value in state.items() if name.startswith("shared.")}
    alone.load_state_dict({**shared, "router.weight": torch.zeros(1, D)})
    return routed, alone


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"bias": False}])
def test_layer_is_the_mean_of_its_shared_and_its_routed_experts(options):
    layer = make_layer(**options)
    routed, shared = parts(layer)
    x = torch.randn(3, 7, D)
    torch.testing.assert_close(layer(x), (routed(x) + shared(x)) / 2)


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"normalize_gates": "after_drop"}])
def test_upcycled_model_equals_dense_at_step_zero(options):
    dense = tiny_clip("custom_blocks")
    sparse = upcycle(dense, CONFIG.replace(**options))
    assert all(layer.shared is not None for layer in moe_layers(sparse).values())
    assert step0_difference(dense, sparse) <= 1e-6


def test_a_token_without_a_slot_still_gets_its_half():
    layer = make_layer(capacity_factor=1e-9)
    x = torch.randn(64, D)
    _, shared = parts(layer)
    y = layer(x)
    without_slot = (layer.router(x).plan.row_of_choice < 0).all(-1)
    assert without_slot.sum() >= 64 - E
    torch.testing.assert_close(y[without_slot], shared(x)[without_slot] / 2)


def test_masked_tokens_get_nothing_from_it():
    layer = make_layer()
    x, mask = torch.randn(4, 6, D), torch.rand(4, 6) > 0.4
    y = layer(x.masked_fill(~mask[..., None], float("nan")), mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    assert torch.equal(y[mask], layer(x[mask]))


def test_flops_and_active_parameters_count_one_more_pass():
    dense = tiny_clip()
    plain, shared = (count(upcycle(dense, CONFIG.replace(shared_expert=flag))) for flag in (False, True))
    one_pass = plain.image_gflops - count(dense).image_gflops  # top 2 adds one pass and the router
    assert shared.image_gflops - plain.image_gflops == pytest.approx(one_pass, rel=0.05)
    assert shared.active_params - plain.active_params == shared.params - plain.params > 0
