"""A CoCa trains on its two losses, dense and sparse."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss
from tiny_families import build, coca_cfg

import clipup
from clipup.clip.inputs import random_inputs
from clipup.train import train

MOE = clipup.MoEConfig.clip_up(num_experts=4, priority=True, towers=("image", "text", "decoder"))


class Batches:
    """The same random pairs again and again."""

    def __init__(self, model, pairs=16, batch_size=8):
        images, texts = random_inputs(model, pairs, seed=torch.seed() % 2**31)
        self.batches = list(zip(images.split(batch_size), texts.split(batch_size), strict=True))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def losses_by_hand(model, images, texts):
    """Contrastive and captioning loss: every next token, where it is no padding, from the image and those before."""
    output = model(images, texts)
    contrastive = ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"])
    likelihood = output["logits"].double().log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
    return contrastive.item(), -likelihood[texts[:, 1:] != 0].mean().item()


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.5, 3.0), (1.0, 0.0)])
def test_the_loss_is_the_weighted_sum_of_both(options, weights):
    model = build(coca_cfg())
    data = Batches(model, pairs=8)
    contrastive, captioning = losses_by_hand(model, *data.batches[0])
    caption_weight, contrastive_weight = weights
    chosen = {"coca_caption_loss_weight": caption_weight, "coca_contrastive_loss_weight": contrastive_weight}

    result = train(options(logs=None, steps=1, **chosen), model=model, loader=data)

    record = result.history[0]
    assert record["caption"] == pytest.approx(caption_weight * captioning, rel=1e-5)
    assert record["contrastive"] == pytest.approx(contrastive_weight * contrastive, rel=1e-5)
    assert record["loss"] == pytest.approx(record["caption"] + record["contrastive"], rel=1e-5)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
def test_both_losses_fall_and_every_part_learns(options, moe):
    dense = build(coca_cfg())
    model = dense if moe is None else clipup.upcycle(dense, moe)
    data = Batches(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = losses_by_hand(model.eval(), *data.batches[0])

    train(options(logs=None, steps=30, lr=3e-3), model=model, loader=data)

    last = losses_by_hand(model.eval(), *data.batches[0])
    assert all(after < at_first for after, at_first in zip(last, first, strict=True))
    for tower in ("visual", "text", "text_decoder"):
        names = [name for name in before if name.startswith(f"{tower}.")]
        assert any(not torch.equal(before[name], model.get_parameter(name)) for name in names)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_accumulation_has_the_gradients_of_one_big_batch(options, weight):
    data = Batches(build(coca_cfg()), pairs=16, batch_size=4)
    whole = Batches(build(coca_cfg()), pairs=16, batch_size=16)
    whole.batches = [tuple(torch.cat(parts) for parts in zip(*data.batches, strict=True))]

    trained = {}
    for name, loader, accum_freq in (("parts", data, 4), ("whole", whole, 1)):
        model = build(coca_cfg())
        settings = {"skip_scheduler": True, "accum_freq": accum_freq, "coca_contrastive_loss_weight": weight}
        trained[name] = train(options(logs=None, steps=1, **settings), model=model, loader=loader)

    assert trained["parts"].history[0]["loss"] == pytest.approx(trained["whole"].history[0]["loss"], rel=1e-5)
    for name, value in trained["whole"].model.state_dict().items():
        torch.testing.assert_close(trained["parts"].model.state_dict()[name], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("changes", "bias", "name"),
    [
        ({}, {}, "--priority"),
        ({"siglip": True}, {"init_logit_bias": -10}, "siglip"),
        ({"multi_positive": True}, {}, "multi_positive"),
        ({}, {"init_logit_bias": -10}, "init_logit_bias"),
    ],
    ids=["capacity by position", "siglip", "multi_positive", "bias"],
)
def test_what_has_no_captioning_loss_or_cannot_be_shuffled_is_refused(options, changes, bias, name):
    model = clipup.upcycle(build({**coca_cfg(), **bias}), MOE.replace(priority=name != "--priority"))
    with pytest.raises(ValueError, match=name):
        train(options(logs=None, **changes), model=model, loader=Batches(model))
