"""Expert choice: experts take tokens, against loops in float64."""

import math

import pytest
import torch
from tiny_clip import tiny_clip

import clipup
from clipup import MoEConfig, SparseMoE
from clipup.clip.flops import count
from clipup.clip.inputs import random_inputs
from clipup.moe.router import expert_choice


def layer(**options):
    torch.manual_seed(0)
    return SparseMoE(16, 24, num_experts=4, top_k=2, routing="expert_choice", **options).double().eval()


def tokens(count=21, seed=1):
    return torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(moe, x, factor, mask):
    """y [T, D] and, for every expert, its tokens."""
    probs = (x @ moe.router.weight.T).softmax(-1)
    able = [t for t in range(len(x)) if mask is None or mask[t]]
    capacity = min(len(able), math.ceil(factor * 2 * len(able) / 4))
    taken = [sorted(able, key=lambda t: (-probs[t, e].item(), t))[:capacity] for e in range(4)]
    y = torch.zeros_like(x)
    for t in able:
        mine = [e for e in range(4) if t in taken[e]]
        total = sum(probs[t, e] for e in mine) if moe.config.normalize_gates != "none" else 1
        for e in mine:
            hidden = torch.nn.functional.gelu(moe.in_weight[e] @ x[t] + moe.in_bias[e])
            y[t] += probs[t, e] / total * (moe.out_weight[e] @ hidden + moe.out_bias[e])
    return y, taken


@pytest.mark.parametrize("normalize", ["none", "before_drop"])
@pytest.mark.parametrize("factor", [None, 0.3, 1.3, 9.0])
@pytest.mark.parametrize("masked", [False, True])
def test_every_expert_takes_its_most_probable_tokens(masked, factor, normalize):
    moe, x = layer(eval_capacity_factor=factor, normalize_gates=normalize), tokens()
    mask = torch.arange(21) % 3 > 0 if masked else None
    wanted, taken = by_loops(moe, x, 1.0 if factor is None else factor, mask)
    if masked:
        x[~mask] = float("nan")
    y, routing = moe(x, mask, return_routing=True)
    torch.testing.assert_close(y, wanted)
    for e in range(4):
        assert (routing.experts == e).any(-1).nonzero().flatten().tolist() == sorted(taken[e])
    assert (routing.experts[~routing.kept] == -1).all() and (routing.gates[~routing.kept] == 0).all()


def test_the_only_gate_is_one_however_improbable_the_expert():
    config = MoEConfig(num_experts=2, top_k=1, routing="expert_choice")
    gating, _ = expert_choice(torch.tensor([[0.0, -104.0], [0.0, -100.0]]), config, 1.0, None)
    assert gating.expert_indices.tolist() == [[0, -1], [1, -1]]
    assert gating.gates.tolist() == [[1.0, 0.0]] * 2


def test_the_router_learns_from_the_gates():
    moe, x = layer(normalize_gates="none").train(), tokens().requires_grad_()
    torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(moe, {"router.weight": w}, (x,)), (x, moe.router.weight)
    )


def test_a_batch_of_masked_tokens_and_one_of_none_give_nothing():
    moe = layer()
    assert not moe(tokens(), torch.zeros(21, dtype=torch.bool)).any()
    assert moe(tokens(0)).shape == (0, 16)


def test_evaluation_takes_the_factor_of_training_unless_it_has_its_own():
    assert layer(capacity_factor=2.0)(tokens(), return_routing=True)[1].kept.sum() == 4 * 21
    assert layer(capacity_factor=2.0, eval_capacity_factor=1.0)(tokens(), return_routing=True)[1].kept.sum() == 4 * 11


def test_tokens_without_an_expert_are_counted():
    moe = layer(eval_capacity_factor=0.2)
    _, routing = moe(tokens(), torch.arange(21) > 0, return_routing=True)
    (metrics,) = clipup.moe_metrics(moe).values()
    torch.testing.assert_close(metrics["dropped"].item(), (~routing.kept[1:].any(-1)).sum().item() / 20)


def test_flops_are_those_of_as_many_choices():
    counts = [
        count(clipup.upcycle(tiny_clip("gelu"), MoEConfig.clip_up(num_experts=4, **options)))
        for options in (
            {},
            {"routing": "expert_choice"},
            {"routing": "expert_choice", "capacity_factor": 1.5},
            {"top_k": 3},
        )
    ]
    assert counts[0] == counts[1] and counts[2] == counts[3] != counts[0]


def test_models_are_upcycled_trained_and_prepared_with_it():
    model = clipup.upcycle(tiny_clip("gelu"), MoEConfig.clip_up(num_experts=4, routing="expert_choice"))
    images, texts = random_inputs(model, 4)
    features = model.encode_image(images).sum() + model.encode_text(texts).sum() + clipup.aux_loss(model)
    features.backward()
    routers = [one.router.weight.grad for one in clipup.moe.layer.moe_layers(model).values()]
    assert routers and all(grad.abs().sum() > 0 for grad in routers)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(clipup.accelerate(model).encode_image(images), model.encode_image(images))
