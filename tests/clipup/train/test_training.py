"""What a run does from its first step to its last."""

import json
import math

import pytest
import torch

import clipup
from clipup.train import Every, train
from clipup.train.optimizer.schedule import Schedule

BIASED = clipup.MoEConfig.clip_up(num_experts=4, selection_bias="sign", local_entropy_weight=0.01)
SIGMOID = {"init_logit_scale": math.log(10), "init_logit_bias": -10}


@pytest.mark.parametrize("moe, siglip", [(None, True), (clipup.MoEConfig.clip_up(num_experts=4), False)])
def test_training_lowers_the_loss(make_model, pairs, options, moe, siglip):
    model = make_model(moe, **SIGMOID if siglip else {})

    result = train(options(logs=None, steps=30, lr=3e-3, siglip=siglip), model=model, loader=pairs(batch_size=24))

    losses = [record["contrastive"] for record in result.history]
    assert len(losses) == result.steps == 30 and losses[-1] < 0.6 * losses[0]


def test_a_sparse_run_logs_every_metric_of_every_step(make_model, pairs, options):
    model = make_model(clipup.MoEConfig.clip_up(num_experts=4))

    result = train(options(), model=model, loader=pairs())

    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert records == result.history
    assert [(record["step"], record["epoch"]) for record in records] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    for record in records:
        assert record["loss"] == pytest.approx(record["contrastive"] + record["aux"], rel=1e-5)
        assert record["aux"] == pytest.approx(2 * (0.01 * record["balance"] + 1e-4 * record["z"]), rel=1e-4)
        assert record["logit_scale"] == pytest.approx(1 / 0.07, rel=0.1)
        assert record["images_per_second"] > 0 and record["seconds"] > 0
        assert 0 <= record["data_time"] < record["batch_time"]
        assert 0 < record["step_time"] < record["batch_time"] and "mfu" not in record
        assert set(record["layers"]) == set(clipup.moe_layers(model))
        assert all(sum(layer["load"]) == pytest.approx(1) for layer in record["layers"].values())
        for name in {name for layer in record["layers"].values() for name in layer}:
            assert f"``{name}``" in clipup.train.__doc__ and f"``{name}``" in clipup.moe_metrics.__doc__
        entropies = [layer["router_entropy"] for layer in record["layers"].values()]
        assert record["router_entropy"] == pytest.approx(sum(entropies) / len(entropies))
    assert "step 6" in (result.directory / "out.log").read_text()


def saved_by(result):
    return torch.load(result.directory / "checkpoints" / "epoch_latest.pt", weights_only=True)


def test_a_model_with_a_layer_that_was_put_in_by_hand_is_trained_and_its_checkpoints_kept(make_model, pairs, options):
    model = make_model(None)
    block = model.visual.transformer.resblocks[1]
    block.mlp = clipup.SparseMoE.from_dense(block.mlp, clipup.MoEConfig(num_experts=2))
    saved = saved_by(train(options(), model=model, loader=pairs()))["state_dict"]
    assert torch.equal(saved["visual.transformer.resblocks.1.mlp.in_weight"], block.mlp.in_weight)


def test_checkpoints_hold_what_the_layers_do_and_layers_that_differ_are_refused(make_model, pairs, options):
    model = make_model(clipup.MoEConfig.clip_up(num_experts=4))
    layers = list(clipup.moe_layers(model).values())
    layers[0].config = layers[0].config.replace(top_k=3)
    with pytest.raises(ValueError, match=r"config differs from .*config \(top_k\)"):
        train(options(logs=None), model=model, loader=pairs())
    for layer in layers:
        layer.config = layer.config.replace(top_k=3, balance_weight=0.5)
    saved = saved_by(train(options(), model=model, loader=pairs()))["moe_cfg"]
    assert clipup.MoEConfig.from_dict(saved) == model.moe_config.replace(top_k=3, balance_weight=0.5)


def test_warm_up_is_a_tenth_of_the_run_unless_set_and_a_resumed_run_keeps_it(make_model, pairs, options):
    usual = {"warmup": None, "lr_scheduler": "const", "lr": 1e-3}
    first = train(options(steps=20, **usual), model=make_model(), loader=pairs(pairs=4, batch_size=2))

    assert [record["lr"] for record in first.history][:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert "over 2 steps" in (first.directory / "out.log").read_text()
    train(options(steps=22, resume="latest", **usual), model=make_model(), loader=pairs(pairs=4, batch_size=2))
    assert json.loads((first.directory / "options.json").read_text())["warmup"] == 2


COOLDOWN = {"lr_scheduler": "const-cooldown", "warmup": 0, "epochs_cooldown": 1}


@pytest.mark.parametrize(
    "changes, name", [({"warmup": 12}, "warmup"), ({**COOLDOWN, "epochs_cooldown": 5}, "epochs_cooldown")]
)
def test_a_run_fresh_or_resumed_says_that_its_schedule_is_longer_and_what_rate_it_reaches(
    make_model, pairs, options, changes, name, caplog
):
    def noted(**usual):
        caplog.clear()
        result = train(options(**usual, **changes), model=make_model(), loader=pairs())
        notes = [text for text in caplog.messages if text.startswith(f"{name}: ")]
        assert len(notes) == 1 and "lr is 0.001" in notes[0]
        return notes[0], max(record["lr"] for record in result.history)

    note, highest = noted(steps=3)
    assert highest < 1e-3 and f"highest learning rate is {highest:g}," in note
    noted(steps=5, resume="latest")


@pytest.mark.parametrize("changes", [{"warmup": 3}, {"warmup": None}, {"warmup": 12, "skip_scheduler": True}, COOLDOWN])
def test_a_schedule_that_is_not_longer_than_the_run_needs_no_note(options, changes):
    assert Schedule(options(steps=3, **changes).optimizer, 3).notes() == []


@pytest.mark.parametrize(
    "start, trained, kept",
    [(math.log(100) + 1, True, math.log(100)), (-1.0, True, 0.0), (math.log(117), False, math.log(117))],
)
def test_a_logit_scale_that_is_trained_is_kept_between_1_and_100(make_model, pairs, options, start, trained, kept):
    model = make_model(init_logit_scale=start)
    model.logit_scale.requires_grad_(trained)

    train(options(logs=None, steps=1, lr=1e-6), model=model, loader=pairs())

    assert model.logit_scale.item() == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("weights, moves", [({"balance_weight": 0.01}, True), ({"z_weight": 0.01}, True), ({}, False)])
def test_the_losses_of_the_layers_reach_their_routers(make_model, pairs, options, weights, moves):
    # with one normalized choice the task gives a router no gradient at all
    model = make_model(clipup.MoEConfig(num_experts=4, top_k=1, **weights))
    before = {name: layer.router.weight.clone() for name, layer in clipup.moe_layers(model).items()}

    train(options(logs=None, steps=2, wd=0.0), model=model, loader=pairs())

    for name, layer in clipup.moe_layers(model).items():
        assert torch.equal(layer.router.weight, before[name]) != moves


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
    plain = train(options(logs=None, steps=5), model=make_model(noisy), loader=pairs())
    looked = train(options(steps=5), model=make_model(noisy), loader=pairs(), callbacks=[Every(2, look)])

    assert [record["step"] for record in looked.evaluations] == [2, 4, 5]
    assert [record["scale"] for record in looked.evaluations] == seen
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, looked.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "train_data is missing"),
        ({"moe_cfg": BIASED, "train_data": "nowhere.csv"}, "moe_cfg has no effect without moe=True"),
        ({"train_data": "nowhere.csv"}, "nowhere.csv"),
        ({"siglip": True, "train_data": "nowhere.csv"}, "logit_bias"),
        ({"device": "mps", "train_data": "nowhere.csv"}, "device"),
    ],
)
def test_a_run_that_cannot_start_is_refused_and_leaves_no_directory(model_directory, options, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(options(model=str(model_directory), **changes))

    assert not (model_directory.parent / "logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend, checkpointing", [("aot_eager", True), ("aot_eager", False), ("inductor", False)])
def test_a_compiled_sparse_step_gives_the_eager_losses_weights_and_selection_biases(
    make_model, pairs, options, backend, checkpointing
):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    usual = {"logs": None, "steps": 3, "warmup": 0, "eps": 1e-3, "grad_checkpointing": checkpointing}
    data = {"pairs": 8, "batch_size": 8}  # a text of full length in each batch: compiled towers also draw for padding
    with torch._inductor.config.patch(fallback_random=True):  # inductor draws what eager does
        eager, compiled = (
            train(options(**usual, **changes), model=make_model(BIASED), loader=pairs(**data))
            for changes in ({}, {"torchcompile": True, "torchcompile_backend": backend})
        )

    for one, other in zip(eager.history, compiled.history, strict=True):
        assert (other["contrastive"], other["aux"]) == pytest.approx((one["contrastive"], one["aux"]), rel=1e-4)
    for name, value in eager.model.state_dict().items():  # selection biases too
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    if not checkpointing:  # a checkpointed forward must not change the layer's state inside a graph
        assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_with_graphs_that_write_into_the_outputs_of_the_step_before_losses_stay_those_of_the_eager_step(
    make_model, pairs, options, monkeypatch, accum_freq
):
    asked = []

    def with_graphs(model, **how):
        """A stand-in for the mode reduce-overhead: a forward pass takes the memory of the outputs of the one before."""
        outputs = []

        def call(*args, **kwargs):
            for output in outputs:
                output.data.fill_(torch.nan)
            found = type(model)._call_impl(model, *args, **kwargs)
            outputs[:] = [value for value in found.values() if not isinstance(value, torch.nn.Parameter)]
            return found

        asked.append(how)
        model._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", with_graphs)
    usual = {"logs": None, "steps": 3, "warmup": 0, "accum_freq": accum_freq}
    graphs = {"torchcompile": True, "torchcompile_mode": "reduce-overhead"}
    eager, compiled = (
        train(options(**usual, **changes), model=make_model(BIASED), loader=pairs(pairs=8, batch_size=4))
        for changes in ({}, graphs)
    )
    assert asked == [{"backend": "inductor", "mode": "reduce-overhead"}]
    for name in ("loss", "contrastive", "aux", "logit_scale"):
        assert [record[name] for record in compiled.history] == [record[name] for record in eager.history], name


@pytest.mark.parametrize(("weights", "moe"), [(False, False), (False, True), (True, True)])
def test_a_run_says_that_it_starts_from_random_weights_where_it_does(
    named_model, model_directory, pairs, options, caplog, weights, moe
):
    def notes(**changes):
        caplog.clear()
        start = str(model_directory) if weights else None
        usual = {"model": named_model, "pretrained": start, "moe": moe, "steps": 1, "warmup": 0}
        train(options(**{**usual, **changes}), loader=pairs(pairs=8))
        assert "No pretrained weights" not in caplog.text  # open_clip's warning, which knows nothing of checkpoints
        return [text for text in caplog.messages if "new weights" in text]

    with pytest.raises(ValueError, match="accum_freq"):
        assert notes(accum_freq=2)
    assert not [text for text in caplog.messages if "weights" in text]
    fresh = notes()
    assert len(fresh) == (not weights) and all(("copies of one random MLP" in text) == moe for text in fresh)
    assert notes(steps=2, resume="latest") == []


def test_a_sparse_run_that_starts_from_a_dense_one_does_not_start_from_random_weights(
    named_model, pairs, options, caplog
):
    usual = {"model": named_model, "steps": 1, "warmup": 0}
    dense = train(options(**usual), loader=pairs()).directory / "checkpoints" / "epoch_latest.pt"
    caplog.clear()

    train(options(**usual, name="sparse", moe=True, resume_dense=str(dense)), loader=pairs())

    assert "No pretrained weights" not in caplog.text and "new weights" not in caplog.text
