"""The losses: values and gradients by their formulas, in chunks, accumulated, and which model each of them takes."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from tiny_families import build, coca_cfg

import clipup
from clipup.clip.inputs import random_inputs
from clipup.train import train
from clipup.train.objectives.coca import CoCaObjective
from clipup.train.objectives.contrastive import ChunkedClipLoss, ContrastiveObjective
from clipup.train.objectives.distillation import DistillationObjective
from clipup.train.objectives.multi_positive import MultiPositiveClipLoss, MultiPositiveObjective
from clipup.train.objectives.sigmoid import ChunkedSigLipLoss, SigmoidObjective
from clipup.train.step import TrainStep

# z-loss in the image tower alone: there every batch has as many tokens, so the mean of means is the mean
SPARSE = clipup.MoEConfig(num_experts=4, z_weight=0.1, towers=("image",))
COCA = clipup.MoEConfig.clip_up(num_experts=4, towers=("image", "text", "decoder"))
BIAS = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
PAIRS = 11


def drawn(pairs=PAIRS):
    """Features in float64 that need gradients, a logit scale and a bias."""
    features = [F.normalize(torch.randn(pairs, 6, dtype=torch.float64), dim=-1) for _ in range(2)]
    scales = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (*features, *scales)]


def naive_multi_positive(images, texts, scale, tokens):
    """The mean over rows of -log p of a row's own pair among itself and the pairs of other captions, both ways."""
    total = 0
    for rows, columns in ((images, texts), (texts, images)):
        scores = scale * rows @ columns.T
        for i in range(len(rows)):
            others = [scores[i, j] for j in range(len(rows)) if tokens[i].tolist() != tokens[j].tolist()]
            total = total + (torch.stack([scores[i, i], *others]).logsumexp(0) - scores[i, i]) / len(rows)
    return total / 2


@pytest.mark.parametrize("chunk_size", [1, 4, PAIRS, None])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "multi_positive"])
def test_a_loss_in_chunks_has_the_value_and_the_gradients_of_its_formula(kind, chunk_size):
    inputs, tokens = drawn(), torch.arange(PAIRS)[:, None].repeat(1, 5) % 4
    if kind == "multi_positive":
        inputs, loss = inputs[:3], MultiPositiveClipLoss(chunk_size)
        ours, expected = loss(*inputs, loss.captions(tokens)), naive_multi_positive(*inputs, tokens)
    else:
        chunked, whole = {"softmax": (ChunkedClipLoss, ClipLoss), "sigmoid": (ChunkedSigLipLoss, SigLipLoss)}[kind]
        ours, expected = chunked(chunk_size)(*inputs), whole()(*inputs)

    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [ChunkedClipLoss, ChunkedSigLipLoss])
def test_no_tensor_that_is_kept_has_more_logits_than_a_chunk(loss):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        loss(chunk_size=8)(*drawn(128)).backward()
    assert max(kept, default=0) <= 8 * 128


def one_step(model, batches, objective):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = TrainStep(model, objective, optimizer, torch.device("cpu"))(batches).losses
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("moe", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "multi_positive", "distill", "coca"])
def test_accumulation_has_the_losses_and_gradients_of_one_big_batch(make_model, pairs, kind, moe):
    data = pairs()
    data.texts[12:] = data.texts[:12]  # each caption in the first and in a later batch

    def model():
        if kind != "coca":
            return make_model(moe, **BIAS if kind == "sigmoid" else {})
        torch.manual_seed(0)
        model = build(coca_cfg())
        return model if moe is None else clipup.upcycle(model, SPARSE)

    images, texts = random_inputs(model(), 24, seed=0) if kind == "coca" else (data.images, data.texts)
    teacher = make_model(seed=1).eval()
    objective = {
        "softmax": ContrastiveObjective,
        "sigmoid": SigmoidObjective,
        "multi_positive": MultiPositiveObjective,
        "distill": lambda: DistillationObjective(teacher, multi_positive=moe is not None),
        "coca": lambda: CoCaObjective(0, 2.0, 1.0),
    }[kind]()

    big, expected = one_step(model(), [(images, texts)], objective)
    parts = list(zip(images.split(8), texts.split(8), strict=True))
    accumulated, gradients = one_step(model(), parts, objective)

    torch.testing.assert_close(accumulated.scalars(), big.scalars(), rtol=1e-4, atol=1e-5)
    assert (big.aux > 0) == (moe is not None)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_both_forward_passes_of_a_batch_draw_the_same_random_numbers(make_model, pairs):
    noisy = clipup.MoEConfig(num_experts=8, top_k=1, router_noise=50.0, normalize_gates="none")
    seen, data = [], pairs()
    objective = ContrastiveObjective()
    objective.loss = lambda images, texts, scale, _: seen.append(images.detach()) or (scale * images * texts).sum()

    one_step(make_model(noisy), list(zip(data.images.split(8), data.texts.split(8), strict=True)), objective)

    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("kind", ["sign", "z_score"])
def test_selection_biases_and_recorded_metrics_are_of_all_batches_of_a_step(make_model, pairs, options, kind):
    moe = clipup.MoEConfig(num_experts=4, selection_bias=kind, selection_bias_rate=0.125)
    biases, loads = [], []
    for batch_size in (16, 8):
        model = make_model(moe)
        settings = options(logs=None, steps=1, accum_freq=16 // batch_size)
        (record,) = train(settings, model=model, loader=pairs(pairs=16, noise=0, batch_size=batch_size)).history
        loads.append([layer["load"] for layer in record["layers"].values()])
        biases.append([layer.router.selection_bias for layer in clipup.moe_layers(model).values()])
    assert loads[1][0] == pytest.approx(loads[0][0], abs=1e-6)
    for big, accumulated in zip(*biases, strict=True):
        assert big.abs().max() > 0.1
        torch.testing.assert_close(accumulated, big)


def test_a_teachers_loss_is_the_cross_entropy_with_its_similarities(make_model, pairs):
    data, teacher = pairs(), make_model(seed=1).eval()
    data.texts[1] = data.texts[0]
    targets, logits = (
        output["logit_scale"] * output["image_features"] @ output["text_features"].T
        for output in (model(data.images, data.texts) for model in (teacher, make_model(SPARSE)))
    )
    distill = sum(
        -(taught.softmax(1) * own.log_softmax(1)).sum(1).mean() / 2
        for taught, own in ((targets, logits), (targets.T, logits.T))
    )

    def terms(objective):
        return one_step(make_model(SPARSE), [(data.images, data.texts)], objective)[0].terms

    both = terms(DistillationObjective(teacher, multi_positive=True))
    assert both["distill"].item() == pytest.approx(distill.item(), rel=1e-4)
    assert both["contrastive"] == terms(MultiPositiveObjective())["contrastive"]
    torch.testing.assert_close(terms(DistillationObjective(teacher)), {**both, **terms(ContrastiveObjective())})


def test_options_select_the_loss(make_model, pairs, options, model_directory):
    data = pairs(pairs=8, noise=0)
    data.texts[4:] = data.texts[:4]

    plain, multi_positive, distilled = (
        train(options(logs=None, steps=1, **changes), model=make_model(seed=3), loader=data).history[0]
        for changes in ({}, {"multi_positive": True}, {"distill_model": str(model_directory)})
    )
    assert multi_positive["contrastive"] < plain["contrastive"] - 1e-3
    assert distilled["contrastive"] == pytest.approx(plain["contrastive"], rel=1e-5)
    assert distilled["loss"] == pytest.approx(distilled["contrastive"] + distilled["distill"], rel=1e-5)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0)])
def test_the_loss_of_a_coca_is_the_weighted_sum_of_both_which_fall(options, weights):
    model = clipup.upcycle(build(coca_cfg()), COCA)
    images, texts = random_inputs(model, 8, seed=0)
    outputs: list[dict[str, torch.Tensor]] = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    caption_weight, contrastive_weight = weights
    chosen = {"coca_caption_loss_weight": caption_weight, "coca_contrastive_loss_weight": contrastive_weight}

    history = train(options(logs=None, steps=15, lr=3e-3, **chosen), model=model, loader=[(images, texts)]).history

    output = outputs[0]
    contrastive = ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"]).item()
    likelihood = output["logits"].double().log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
    captioning = -likelihood[texts[:, 1:] != 0].mean().item()
    assert history[0]["caption"] == pytest.approx(caption_weight * captioning, rel=1e-4)
    assert history[0]["contrastive"] == pytest.approx(contrastive_weight * contrastive, rel=1e-4)
    assert history[-1]["caption"] < history[0]["caption"]


@pytest.mark.parametrize(
    ("coca", "changes", "bias", "name"),
    [
        (True, {"siglip": True}, BIAS, "siglip"),
        (True, {"multi_positive": True}, {}, "multi_positive"),
        (True, {}, BIAS, "init_logit_bias"),
        (False, {"multi_positive": True}, BIAS, "multi_positive has no logit_bias"),
        (False, {"distill_model": "tiny"}, BIAS, "distill_model has no logit_bias"),
        (False, {"siglip": True}, {}, "siglip needs a logit_bias"),
        (False, {"distill_model": "tiny"}, {}, "distill_pretrained"),
        (False, {"coca_caption_loss_weight": 1.0}, {}, "coca_caption_loss_weight"),
    ],
)
def test_losses_that_a_model_cannot_be_trained_with_are_refused_by_name(
    make_model, named_model, options, coca, changes, bias, name
):
    model = clipup.upcycle(build({**coca_cfg(), **bias}), COCA) if coca else make_model(**bias)
    with pytest.raises(ValueError, match=name):
        train(options(logs=None, **changes), model=model, loader=[random_inputs(model, 4)])


@pytest.mark.parametrize("part, change", [("vision_cfg", {"image_size": 32}), ("text_cfg", {"vocab_size": 64})])
def test_a_teacher_of_other_images_or_texts_is_refused_by_name(
    make_model, pairs, options, model_directory, tmp_path, part, change
):
    cfg = clipup.get_model_config(str(model_directory))
    cfg = {**cfg, part: {**cfg[part], **change}}
    clipup.save_pretrained(open_clip.CLIP(**cfg), tmp_path / "teacher", cfg)
    with pytest.raises(ValueError, match="distill_model"):
        train(options(distill_model=str(tmp_path / "teacher")), model=make_model(SPARSE), loader=pairs())
