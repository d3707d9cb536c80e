"""Pairs with equal captions are not negatives of each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

import clipup
from clipup.train import train
from clipup.train.chunked_losses import MultiPositiveClipLoss
from clipup.train.objectives import MultiPositiveObjective
from clipup.train.step import TrainStep


def drawn(pairs: int, captions: int):
    """Features in float64 that need gradients, a logit scale, and texts of which only ``captions`` differ."""
    features = [F.normalize(torch.randn(pairs, 6, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2)]
    texts = torch.randint(1, 100, (captions, 5))[torch.randint(captions, (pairs,))]
    return *features, torch.tensor(9.0, dtype=torch.float64, requires_grad=True), texts


def naive(images, texts, scale, tokens):
    """The mean over rows of -log p of a row's own pair among itself and the pairs of other captions, both ways."""
    total = 0
    for rows, columns in ((images, texts), (texts, images)):
        scores = scale * rows @ columns.T
        for i in range(len(rows)):
            others = [scores[i, j] for j in range(len(rows)) if tokens[i].tolist() != tokens[j].tolist()]
            total = total + (torch.stack([scores[i, i], *others]).logsumexp(0) - scores[i, i]) / len(rows)
    return total / 2


@pytest.mark.parametrize("pairs, captions", [(7, 3), (12, 1), (1, 1), (9, 40)])
def test_the_loss_and_its_gradients_are_those_of_the_formula(pairs, captions):
    *inputs, texts = drawn(pairs, captions)

    ours = MultiPositiveClipLoss()(*inputs, texts)
    expected = naive(*inputs, texts)

    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_is_open_clips_loss_where_all_captions_differ():
    images, texts, scale, _ = drawn(11, 1)
    tokens = torch.arange(11)[:, None].repeat(1, 4)

    torch.testing.assert_close(
        MultiPositiveClipLoss()(images, texts, scale, tokens).double(),
        ClipLoss()(images, texts, scale),
        rtol=1e-5,
        atol=1e-6,
    )


def test_accumulation_finds_equal_captions_across_batches(make_model, pairs):
    data = pairs()
    data.texts[12:] = data.texts[:12]  # each caption in the first and in a later batch

    def step(batches):
        model = make_model(clipup.MoEConfig(num_experts=4, z_weight=0.1, towers=("image",)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        losses = TrainStep(model, MultiPositiveObjective(), optimizer, torch.device("cpu"))(batches)
        return losses, [parameter.grad.clone() for parameter in model.parameters()]

    big, expected = step([(data.images, data.texts)])
    accumulated, gradients = step(list(zip(data.images.split(8), data.texts.split(8), strict=True)))

    torch.testing.assert_close(accumulated.scalars(), big.scalars(), rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_option_trains_with_it(make_model, pairs, options):
    def first_loss(repeated, **changes):
        data = pairs(pairs=8, noise=0)
        if repeated:
            data.texts[4:] = data.texts[:4]
        return train(options(logs=None, steps=1, **changes), model=make_model(), loader=data).history[0]["contrastive"]

    assert first_loss(False, multi_positive=True) == pytest.approx(first_loss(False), rel=1e-5)
    assert first_loss(True, multi_positive=True) != pytest.approx(first_loss(True), rel=1e-3)


@pytest.mark.parametrize(("option", "value"), [("multi_positive", True), ("distill_model", "ViT-B-32")])
def test_a_model_with_a_bias_is_refused_by_name(make_model, pairs, options, option, value):
    model = make_model(init_logit_bias=-10.0)
    with pytest.raises(ValueError, match=f"{option} has no logit_bias"):
        train(options(logs=None, **{option: value}), model=model, loader=pairs())
