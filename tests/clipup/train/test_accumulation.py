"""A step on several batches equals the step on one big batch."""

from __future__ import annotations

import math

import pytest
import torch

import clipup
from clipup.train.objectives import ContrastiveObjective, SigmoidObjective
from clipup.train.step import TrainStep

# z-loss in the image tower alone: there every batch has as many tokens, so the mean of means is the mean
SPARSE = clipup.MoEConfig(num_experts=4, z_weight=0.1, towers=("image",))


def gradients_of_one_step(model, batches, objective):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = TrainStep(model, objective, optimizer, torch.device("cpu"))(batches)
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("moe", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("siglip", [False, True], ids=["softmax", "sigmoid"])
def test_accumulation_has_the_losses_and_gradients_of_one_big_batch(make_model, pairs, moe, siglip):
    data = pairs()
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if siglip else {}
    objective = SigmoidObjective() if siglip else ContrastiveObjective()
    parts = list(zip(data.images.split(8), data.texts.split(8), strict=True))

    big, expected = gradients_of_one_step(make_model(moe, **bias), [(data.images, data.texts)], objective)
    accumulated, gradients = gradients_of_one_step(make_model(moe, **bias), parts, objective)

    torch.testing.assert_close(accumulated.scalars(), big.scalars(), rtol=1e-5, atol=1e-6)
    assert (big.aux > 0) == (moe is not None)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_both_forward_passes_of_a_batch_draw_the_same_random_numbers(make_model, pairs):
    noisy = clipup.MoEConfig(num_experts=8, top_k=1, router_noise=50.0, normalize_gates="none")
    seen = []

    class Watched(ContrastiveObjective):
        def terms(self, output, targets):
            seen.append(torch.cat([output["image_features"], output["text_features"]]).detach())
            return super().terms(output, targets)

    data = pairs()
    parts = list(zip(data.images.split(8), data.texts.split(8), strict=True))

    gradients_of_one_step(make_model(noisy), parts, Watched())

    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("kind", ["sign", "z_score"])
def test_step_moves_the_selection_bias_by_the_load_of_all_its_batches(make_model, pairs, kind):
    moe = clipup.MoEConfig(num_experts=4, selection_bias=kind, selection_bias_rate=0.125)
    data = pairs()
    parts = list(zip(data.images.split(8), data.texts.split(8), strict=True))
    biases = []
    for batches in ([(data.images, data.texts)], parts):
        model = make_model(moe)
        gradients_of_one_step(model, batches, ContrastiveObjective())
        biases.append([layer.router.selection_bias for layer in clipup.moe_layers(model).values()])
    for big, accumulated in zip(*biases, strict=True):
        assert big.abs().max() > 0.1
        torch.testing.assert_close(accumulated, big)
