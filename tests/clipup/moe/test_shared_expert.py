"""The shared expert: every token takes it, and an upcycled layer starts as the dense MLP."""

import pytest
import torch
from tiny_clip import tiny_clip, tiny_config
from tiny_families import timm_model

from clipup import (
    MoEConfig,
    SparseMoE,
    create_model_and_transforms,
    moe_layers,
    save_pretrained,
    step0_difference,
    upcycle,
)
from clipup.clip.flops import count, count_active
from clipup.moe.weight_decay import decays

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
    options["dtype"] = layer.in_weight.dtype
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


def test_gradients_reach_every_part():
    layer = make_layer().double()
    routed, shared = parts(layer)
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, D, dtype=torch.float64)
    names = ("in_weight", "in_bias", "out_weight", "out_bias")
    inputs = [x, layer.router.weight] + [getattr(owner, n) for owner in (layer, layer.shared) for n in names]
    expected = [x, routed.router.weight] + [getattr(owner, n) for owner in (routed, shared) for n in names]
    found = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    definition = torch.autograd.grad(((routed(x) + shared(x)) / 2 * weights).sum(), expected)
    for one, other in zip(found, definition, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu", "custom_blocks"])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"normalize_gates": "after_drop"}])
def test_upcycled_model_equals_dense_at_step_zero(kind, options):
    dense = tiny_clip(kind)
    sparse = upcycle(dense, CONFIG.replace(**options))
    assert all(layer.shared is not None for layer in moe_layers(sparse).values())
    assert step0_difference(dense, sparse) <= 1e-6


def test_normed_mlps_get_a_shared_expert_too():
    dense = timm_model("EvaBlock/SwiGLU, normed")
    sparse = upcycle(dense, MoEConfig(num_experts=2, towers=("image",), shared_expert=True))
    assert next(iter(moe_layers(sparse).values())).shared.ln_weight is not None
    assert step0_difference(dense, sparse, images=torch.randn(3, 3, 32, 32)) <= 1e-6


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


def test_saved_model_loads_as_it_was(tmp_path):
    sparse = upcycle(tiny_clip(), CONFIG)
    save_pretrained(sparse, tmp_path, tiny_config())
    loaded, *_ = create_model_and_transforms(str(tmp_path))
    assert loaded.moe_config == CONFIG and step0_difference(sparse, loaded) == 0


def test_flops_and_active_parameters_count_one_more_pass():
    dense = tiny_clip()
    plain, shared = (count(upcycle(dense, CONFIG.replace(shared_expert=flag))) for flag in (False, True))
    one_pass = plain.image_gflops - count(dense).image_gflops  # top 2 adds one pass and the router
    assert shared.image_gflops - plain.image_gflops == pytest.approx(one_pass, rel=0.05)
    layers = moe_layers(upcycle(dense, CONFIG)).values()
    added = sum(parameter.numel() for layer in layers for parameter in layer.shared.parameters())
    assert shared.active_params - plain.active_params == shared.params - plain.params == added
    assert count_active(upcycle(dense, CONFIG)) == shared.active_params


def test_its_biases_do_not_decay_and_its_matrices_do():
    layer = make_layer()
    kept = {name for name, parameter in layer.shared.named_parameters() if decays(name, parameter)}
    assert kept == {"in_weight", "out_weight"}


def test_layer_without_one_cannot_be_given_one_by_its_config():
    layer = SparseMoE(D, H)
    with pytest.raises(ValueError, match="config.shared_expert is True, but the layer was made with False"):
        layer.config = layer.config.replace(shared_expert=True)
