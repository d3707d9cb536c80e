"""What a run does from its first step to its last."""

from __future__ import annotations

import json
import math

import pytest
import torch

import clipup
from clipup.train import Every, train

DROPLESS = clipup.MoEConfig(num_experts=4, balance_weight=0.01, z_weight=1e-3)


@pytest.mark.parametrize("moe", [None, clipup.MoEConfig.clip_up(num_experts=4)], ids=["dense", "sparse"])
@pytest.mark.parametrize("siglip", [False, True], ids=["softmax", "sigmoid"])
def test_training_lowers_the_loss(make_model, pairs, options, moe, siglip):
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10} if siglip else {}
    model = make_model(moe, **bias)

    result = train(options(logs=None, steps=40, lr=3e-3, siglip=siglip), model=model, loader=pairs(batch_size=24))

    losses = [record["contrastive"] for record in result.history]
    assert len(losses) == result.steps == 40
    assert losses[-1] < 0.5 * losses[0]


def test_a_sparse_run_logs_every_metric_of_every_step(make_model, pairs, options):
    model = make_model(clipup.MoEConfig.clip_up(num_experts=4))

    result = train(options(), model=model, loader=pairs())

    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records == result.history
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 1]
    for record in records:
        assert record["loss"] == pytest.approx(record["contrastive"] + record["aux"], rel=1e-5)
        assert record["aux"] == pytest.approx(2 * (0.01 * record["balance"] + 1e-4 * record["z"]), rel=1e-4)
        assert record["logit_scale"] == pytest.approx(1 / 0.07, rel=0.1)
        assert record["images_per_second"] > 0 and record["seconds"] > 0
        assert 0 <= record["data_time"] < record["batch_time"]
        assert 0 < record["step_time"] < record["batch_time"] and "mfu" not in record
        assert 0 <= record["dropped"] < 1 and 0 < record["router_entropy"] <= math.log(4) + 1e-5
        assert set(record["layers"]) == set(clipup.moe_layers(model))
        for layer in record["layers"].values():
            assert sum(layer["load"]) == pytest.approx(1) and len(layer["load"]) == 4
            assert {"balance", "z", "dropped", "router_entropy"} < set(layer)
    assert "step 6" in (result.directory / "out.log").read_text()


def test_nothing_is_learned_from_unrelated_images_and_texts_under_a_small_capacity(make_model, options):
    # were slots given by the place in the batch to both towers alike, pairs could be told by what they lack: 2.4 nats
    class Unrelated:
        def __len__(self):
            return 1000

        def __iter__(self):
            texts = torch.tensor([[0] * 6 + [49407, 0]] * 16)
            for _ in range(1000):
                texts[:, :6] = torch.randint(1, 1000, (16, 6))
                yield torch.randn(16, 3, 16, 16), texts.clone()

    scarce = clipup.MoEConfig(num_experts=2, top_k=1, capacity_factor=0.5, blocks=(0, 1))
    settings = options(logs=None, steps=100, lr=5e-3, lr_scheduler="const", warmup=10)

    result = train(settings, model=make_model(scarce), loader=Unrelated())

    last = [record["contrastive"] for record in result.history[-20:]]
    assert sum(last) / 20 == pytest.approx(math.log(16), abs=0.05)


@pytest.mark.parametrize("moe", [None, DROPLESS], ids=["dense", "sparse"])
def test_gradient_checkpointing_changes_no_loss(make_model, pairs, options, moe):
    def losses(**changes):
        result = train(options(logs=None, **changes), model=make_model(moe), loader=pairs())
        return [(record["contrastive"], record["aux"]) for record in result.history]

    assert torch.tensor(losses(grad_checkpointing=True)) == pytest.approx(torch.tensor(losses()), rel=1e-6)


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_autocast_follows_float32(make_model, pairs, options, precision):
    def losses(precision):
        result = train(options(logs=None, steps=20, precision=precision), model=make_model(DROPLESS), loader=pairs())
        return [record["loss"] for record in result.history]

    half, full = losses(precision), losses("fp32")
    assert half[0] == pytest.approx(full[0], rel=0.01)
    assert half[-1] < 0.8 * half[0]  # float16 skips steps until the gradient's scale fits


def test_learning_rate_warms_up_and_falls_along_a_cosine(make_model, pairs, options):
    result = train(options(logs=None, steps=10, warmup=4, lr=1e-3), model=make_model(), loader=pairs())

    rates = [record["lr"] for record in result.history]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([0.5e-3 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


def test_warm_up_is_a_tenth_of_the_run_unless_set_and_a_resumed_run_keeps_it(make_model, pairs, options):
    usual = {"warmup": None, "lr_scheduler": "const", "lr": 1e-3}
    first = train(options(steps=20, **usual), model=make_model(), loader=pairs())

    assert [record["lr"] for record in first.history][:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert "over 2 steps" in (first.directory / "out.log").read_text()
    train(options(steps=40, resume="latest", **usual), model=make_model(), loader=pairs())
    assert json.loads((first.directory / "options.json").read_text())["warmup"] == 2
    shortest = train(options(steps=3, name="short", **usual), model=make_model(), loader=pairs())
    assert [record["lr"] for record in shortest.history] == pytest.approx([1e-3] * 3)


@pytest.mark.parametrize("start, kept", [(math.log(100) + 1, math.log(100)), (-1.0, 0.0)])
def test_the_logit_scale_is_kept_between_1_and_100(make_model, pairs, options, start, kept):
    model = make_model(init_logit_scale=start)

    train(options(logs=None, steps=1, lr=1e-6), model=model, loader=pairs())

    assert model.logit_scale.item() == pytest.approx(kept, abs=1e-5)


def test_the_losses_of_the_layers_reach_their_routers(make_model, pairs, options):
    def router_moves(**weights):
        # with one normalised choice the task gives a router no gradient at all
        model = make_model(clipup.MoEConfig(num_experts=4, top_k=1, **weights))
        before = {name: layer.router.weight.clone() for name, layer in clipup.moe_layers(model).items()}
        train(options(logs=None, steps=2, wd=0.0), model=model, loader=pairs())
        return [not torch.equal(layer.router.weight, before[name]) for name, layer in clipup.moe_layers(model).items()]

    assert router_moves(balance_weight=0.01) == router_moves(z_weight=0.01) == [True, True]
    assert router_moves() == [False, False]


def test_gradients_are_clipped_to_the_norm(make_model, pairs, options):
    model, before = make_model(), make_model().state_dict()
    settings = {"logs": None, "steps": 1, "warmup": 0, "lr": 1.0, "eps": 1e6, "wd": 0, "grad_clip_norm": 1e-3}

    train(options(**settings), model=model, loader=pairs())

    # with a huge epsilon AdamW moves by lr * gradient / eps
    moved = sum(((model.state_dict()[name] - before[name]) ** 2).sum() for name in before).sqrt()
    assert moved.item() == pytest.approx(0, abs=1.01e-9)
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradients.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_callbacks_see_the_model_at_their_steps_and_at_the_end_and_do_not_change_the_run(make_model, pairs, options):
    seen = []

    def look(model):
        seen.append(model.logit_scale.item())
        model.eval()
        torch.rand(100)
        return {"scale": seen[-1]}

    noisy = clipup.MoEConfig.clip_up(num_experts=4, router_noise=1.0)  # in training mode alone
    plain = train(options(logs=None, steps=7), model=make_model(noisy), loader=pairs())
    looked = train(options(steps=7), model=make_model(noisy), loader=pairs(), callbacks=[Every(2, look)])

    assert [record["step"] for record in looked.evaluations] == [2, 4, 6, 7]
    assert [record["scale"] for record in looked.evaluations] == seen
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, looked.model.state_dict()[name]), name


def test_the_trained_model_is_saved_and_loads(model_directory, pairs, options):
    result = train(options(model=str(model_directory), moe=True, steps=2), loader=pairs())

    saved, _, _ = clipup.create_model_and_transforms(str(result.directory / "model"))
    assert saved.moe_config == clipup.MoEConfig.clip_up(towers=("image", "text"))
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name


def test_a_model_with_random_weights_gets_the_sigmoid_losss_bias_and_keeps_it_when_saved(named_model, pairs, options):
    result = train(options(model=named_model, siglip=True, steps=1), loader=pairs())

    saved, _, _ = clipup.create_model_and_transforms(str(result.directory / "model"))
    assert torch.equal(saved.logit_bias, result.model.logit_bias)
    assert saved.logit_bias.item() == pytest.approx(-10, abs=0.01)


def test_tensorboard_has_the_metrics(make_model, pairs, options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(options(report_to="tensorboard"), model=make_model(DROPLESS), loader=pairs())

    events = EventAccumulator(str(result.directory / "tensorboard"))
    events.Reload()
    loss = [event.value for event in events.Scalars("train/loss")]
    assert loss == pytest.approx([record["loss"] for record in result.history])
    layer = next(iter(clipup.moe_layers(result.model)))
    assert len(events.Scalars(f"train/layers/{layer}/load/3")) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "train_data is missing"),
        ({"train_data": "nowhere.csv"}, "nowhere.csv"),
        ({"siglip": True, "train_data": "nowhere.csv"}, "logit_bias"),
        ({"device": "cuda", "train_data": "nowhere.csv"}, "no CUDA GPU"),
    ],
)
def test_a_run_that_cannot_start_is_refused_and_leaves_no_directory(model_directory, options, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        changes = {**changes, "device": "cpu"}
        message = "nowhere.csv"
    settings = options(model=str(model_directory), **changes)

    with pytest.raises((ValueError, OSError), match=message):
        train(settings)

    assert not (model_directory.parent / "logs").exists()
