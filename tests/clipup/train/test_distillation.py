"""The dense model as teacher (open_clip's DistillClipLoss)."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch

import clipup
from clipup.train import train
from clipup.train.objectives import DistillationObjective, MultiPositiveObjective
from clipup.train.step import TrainStep

MOE = clipup.MoEConfig(num_experts=4, z_weight=0.1, towers=("image",))


def one_step(model, teacher, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = TrainStep(model, DistillationObjective(teacher), optimizer, torch.device("cpu"))(batches)
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def similarities(model, images, texts):
    out = model(images, texts)
    return out["logit_scale"] * out["image_features"] @ out["text_features"].T


def test_loss_is_contrastive_plus_the_cross_entropy_with_the_teachers_similarities(make_model, pairs):
    model, teacher, data = make_model(MOE), make_model(seed=1).eval(), pairs()

    losses, gradients = one_step(model, teacher, [(data.images, data.texts)])

    student = make_model(MOE)
    logits, targets = similarities(student, data.images, data.texts), similarities(teacher, data.images, data.texts)
    distill = sum(
        -(taught.detach().softmax(1) * own.log_softmax(1)).sum(1).mean() / 2
        for taught, own in ((targets, logits), (targets.T, logits.T))
    )
    numbers = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    contrastive = (cross_entropy(logits, numbers) + cross_entropy(logits.T, numbers)) / 2
    aux = clipup.aux_loss(student)
    torch.testing.assert_close(losses.terms["distill"], distill.detach())
    torch.testing.assert_close(losses.terms["contrastive"], contrastive.detach())
    torch.testing.assert_close(losses.total, (contrastive + distill + aux).detach())
    (contrastive + distill + aux).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=5e-6)


def test_equal_captions_do_not_compete_but_are_compared_with_the_teacher(make_model, pairs):
    data, teacher = pairs(), make_model(seed=1).eval()
    texts = data.texts.clone()
    texts[1] = texts[0]

    def terms(objective):
        model = make_model(MOE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return TrainStep(model, objective, optimizer, torch.device("cpu"))([(data.images, texts)]).terms

    alone, plain = terms(MultiPositiveObjective()), terms(DistillationObjective(teacher))
    both = terms(DistillationObjective(teacher, multi_positive=True))
    torch.testing.assert_close(both["contrastive"], alone["contrastive"])
    torch.testing.assert_close(both["distill"], plain["distill"])
    assert both["contrastive"] < plain["contrastive"]


def test_an_accumulated_step_equals_one_on_a_big_batch(make_model, pairs):
    teacher, data = make_model(seed=1).eval(), pairs()
    parts = list(zip(data.images.split(8), data.texts.split(8), strict=True))

    big, expected = one_step(make_model(MOE), teacher, [(data.images, data.texts)])
    accumulated, gradients = one_step(make_model(MOE), teacher, parts)

    torch.testing.assert_close(accumulated.scalars(), big.scalars(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_run_with_a_teacher_records_its_loss_and_does_not_change_it(make_model, pairs, options, model_directory):
    teacher = clipup.create_model_and_transforms(str(model_directory))[0].state_dict()

    result = train(options(distill_model=str(model_directory)), model=make_model(MOE, seed=3), loader=pairs())

    for record in result.history:
        assert record["loss"] == pytest.approx(record["contrastive"] + record["aux"] + record["distill"], rel=1e-5)
        assert record["distill"] > 0
    after = clipup.create_model_and_transforms(str(model_directory))[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in teacher.items())
    without = train(options(name="without"), model=make_model(MOE, seed=3), loader=pairs())
    assert "distill" not in without.history[0]
    assert without.history[-1]["contrastive"] != result.history[-1]["contrastive"]


def test_teachers_that_cannot_teach_are_refused_by_name(make_model, pairs, options, named_model):
    with pytest.raises(ValueError, match="distill_pretrained is missing, so tiny would have random weights"):
        train(options(distill_model=named_model), model=make_model(MOE), loader=pairs())


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("vision_cfg", {"image_size": 32}, r"has image size \(32, 32\), the model that it teaches has \(16, 16\)"),
        ("text_cfg", {"vocab_size": 64}, "has vocabulary size 64, the model that it teaches has 49408"),
    ],
)
def test_teacher_of_other_images_or_texts_is_refused_by_name(
    make_model, pairs, options, tmp_path, part, change, message
):
    cfg = copy.deepcopy(clipup.get_model_config("ViT-B-32"))
    cfg["vision_cfg"] |= {"image_size": 16, "width": 32, "layers": 1, "head_width": 16, "patch_size": 16}
    cfg["text_cfg"] |= {"width": 32, "layers": 1, "heads": 2, "context_length": 8}
    cfg[part] |= change
    clipup.save_pretrained(open_clip.CLIP(**{**cfg, "embed_dim": 16}), tmp_path / "teacher", {**cfg, "embed_dim": 16})
    with pytest.raises(ValueError, match=message):
        train(options(distill_model=str(tmp_path / "teacher")), model=make_model(MOE), loader=pairs())
