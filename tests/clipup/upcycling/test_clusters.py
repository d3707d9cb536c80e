"""Cluster-aware initialization: router and experts fit the clusters of what the MLPs see."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import tiny_clip
from tiny_hugging_face import tiny_hugging_face

import clipup
from clipup import MoEConfig, initialize_by_clusters, moe_layers, step0_difference, upcycle
from clipup.clip.inputs import random_inputs
from clipup.dense.expert_clusters import spherical_k_means

CONFIG = MoEConfig.clip_up(num_experts=4)


def batches(model, count=4, size=16):
    return [random_inputs(model, size, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("rows", [torch.ones(9, 3), torch.zeros(5, 3), torch.eye(4)], ids=["equal", "zero", "as many"])
def test_no_cluster_is_empty(rows):
    centers, owner = spherical_k_means(rows, 4)
    assert centers.isfinite().all() and owner.bincount(minlength=4).min() >= 1


def test_full_energy_keeps_the_dense_function():
    dense = tiny_clip("gelu")
    sparse = upcycle(dense, CONFIG)
    initialize_by_clusters(sparse, batches(sparse), energy=1)
    for name, layer in moe_layers(sparse).items():
        assert torch.equal(layer.in_weight, layer.in_weight[:1].expand_as(layer.in_weight)), name
    assert step0_difference(dense, sparse, *batches(sparse)[0]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"padding_aware": False}, {"shared_expert": True}], ids=str)
def test_experts_fit_their_own_clusters_best(options):
    dense = tiny_clip("gelu")
    sparse = upcycle(dense, CONFIG.replace(**options))
    seen = {}
    for name, layer in moe_layers(sparse).items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen.update({name: inputs}))
    images, texts = random_inputs(sparse, 64)
    with torch.no_grad():
        sparse.eval()(images, texts)
    dense_experts = {name: layer.in_weight[0].clone() for name, layer in moe_layers(sparse).items()}
    found = initialize_by_clusters(sparse, [(images, texts)], energy=0.8)
    for name, layer in moe_layers(sparse).items():
        assert sum(found[name].sizes) > 4 and set(found[name].ranks) == {"in_weight", "out_weight"}
        torch.testing.assert_close(layer.router.weight.norm(dim=-1), torch.ones(4))
        x = seen[name][0].reshape(-1, layer.d_model)
        if len(seen[name]) == 2:
            x = x[seen[name][1].reshape(-1).bool()]
        owner = (F.normalize(x, dim=-1) @ layer.router.weight.T).argmax(1)
        exact = x @ dense_experts[name].T
        lost = (x @ layer.in_weight.detach().mT - exact).square().sum(-1)  # of every expert on every token
        mine = F.one_hot(owner, 4).float()
        errors = lost @ mine / (exact.square().sum(-1) @ mine)
        assert (errors.diag() < 0.25).all()
        assert errors.diag().mean() < errors.masked_fill(torch.eye(4).bool(), 0).sum() / 12


def test_the_same_seed_gives_the_same_bits_and_inputs_may_be_sampled():
    first = upcycle(tiny_clip("gelu"), CONFIG)
    second = copy.deepcopy(first)
    for one in (first, second):
        found = initialize_by_clusters(one, batches(one), tokens=100, seed=5)
    assert all(sum(layer.sizes) == 100 for layer in found.values())
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{"routing": "expert_choice"}, {"normalize_gates": "none"}], ids=str)
def test_clusters_are_those_of_the_dense_function_whatever_the_routing(options):
    plain = upcycle(tiny_clip("gelu"), CONFIG.replace(blocks="every"))
    other = upcycle(tiny_clip("gelu"), CONFIG.replace(blocks="every", **options))
    for model in (plain, other):
        initialize_by_clusters(model, batches(plain), energy=0.9)
    for name, layer in moe_layers(plain).items():
        torch.testing.assert_close(layer.router.weight, moe_layers(other)[name].router.weight, rtol=1e-3, atol=1e-3)
        assert moe_layers(other)[name].config == other.moe_config


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (None, {"energy": 0.0}, ValueError, "energy"),
        (None, {"tokens": 0}, ValueError, "tokens"),
        (None, {"tokens": 3}, ValueError, "tokens"),
        (None, {"seed": 1.5}, ValueError, "seed"),
        (None, {"batches": []}, ValueError, "batches"),
        (
            lambda: upcycle(tiny_clip("gelu"), CONFIG.replace(reinit_ratio=0.5)),
            {},
            ValueError,
            "the experts of .* differ",
        ),
        (lambda: tiny_clip("gelu"), {}, ValueError, "model has no sparse layers"),
        (lambda: clipup.accelerate(upcycle(tiny_clip("gelu"), CONFIG)), {}, ValueError, "model was prepared"),
        (lambda: upcycle(tiny_hugging_face("CLIPModel")), {}, TypeError, "model is one of transformers"),
    ],
)
def test_invalid_arguments_are_refused_and_change_nothing(make, arguments, error, message):
    model = upcycle(tiny_clip("gelu"), CONFIG) if make is None else make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        initialize_by_clusters(model, **{"batches": batches(tiny_clip("gelu"), 1)} | arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
