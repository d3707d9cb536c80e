"""Gradients, losses and weights that are NaN or infinite: what is skipped, what stops a run, what is never written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import clipup
from clipup.train import Every, NonFiniteGradients, NonFiniteWeights, train
from clipup.train.checkpoints.open_clip_format import load

BALANCED = clipup.MoEConfig.clip_up(num_experts=4, selection_bias="sign")


class Poisoned:
    """Batches of which some hold a NaN, from the first one on counted over all epochs."""

    def __init__(self, batches, *positions):
        self.batches, self.positions, self.served = batches, positions, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, texts in self.batches:
            yield (images * torch.nan if self.served in self.positions else images), texts
            self.served += 1


def spoil_gradients(model, value, steps):
    """Gives one weight a gradient of this value in these steps (from 1 on), under a loss that is finite."""
    calls = []

    def spoil(gradient):
        calls.append(len(calls) + 1)
        return torch.full_like(gradient, value) if calls[-1] in steps else gradient

    model.visual.proj.register_hook(spoil)
    return model


class Watch:
    """The model's state after every step."""

    def __init__(self):
        self.states = []

    def __call__(self, model):
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def checkpoint_of(directory):
    return load(directory / "checkpoints" / "epoch_latest.pt")


SETTINGS = [
    {},
    {"grad_clip_norm": 1.0},
    {"accum_freq": 2},
    {"precision": "amp"},
    {"precision": "amp", "grad_clip_norm": 1.0},
    {"precision": "amp_bf16"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: " ".join(map(str, one.values())) or "plain")
def test_a_step_with_a_nan_batch_is_not_applied_and_the_run_continues(make_model, pairs, options, settings):
    watch, accum = Watch(), settings.get("accum_freq", 1)
    model = make_model(None if settings.get("precision") == "amp" else BALANCED)
    loader = Poisoned(pairs(pairs=64 * accum), 3 * accum)  # step 4

    usual = {"steps": 8, "eps": 1e-4, "save_frequency": 0, "save_most_recent": False}
    result = train(options(**usual, **settings), model=model, loader=loader, callbacks=[Every(1, watch)])

    before, skipped, after = watch.states[2:5]
    assert same(before, skipped) and not same(skipped, after)
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    counts = [record["skipped_steps"] for record in result.history]
    assert counts[3] == counts[2] + 1 == counts[-1]
    assert counts[2] == 0 or "amp" in settings.values()  # where the scaler has looked for its scale
    assert [record["loss"] is None for record in result.history] == [False] * 3 + [True] + [False] * 4
    assert checkpoint_of(result.directory)["optimizer"]["state"][0]["step"] == 8 - counts[-1]
    assert f"step 4 not applied: its gradient norm is nan (1 in a row, {counts[3]} in all)" in log(result.directory)
    lines = (result.directory / "metrics.jsonl").read_text()
    assert "NaN" not in lines and json.loads(lines.splitlines()[3])["contrastive"] is None


def log(directory):
    return (directory / "out.log").read_text()


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_such_steps_in_a_row_stop_the_run_and_leave_a_finite_checkpoint(make_model, pairs, options, most):
    model = spoil_gradients(make_model(), torch.inf, {2, *range(4, 20)})
    first = 2 if most == 0 else 4 + most

    with pytest.raises(NonFiniteGradients, match=rf"is inf at step {first},.*max_nonfinite_steps={most}; .*are finite"):
        train(options(steps=20, save_every_n_steps=1, max_nonfinite_steps=most), model=model, loader=pairs())

    state = checkpoint_of_run(options())
    assert state["step"] == first - 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert not (run_directory(options()) / "model").exists()


def run_directory(options):
    return Path(options.logs) / options.name


def checkpoint_of_run(options):
    return checkpoint_of(run_directory(options))


def test_consecutive_steps_are_counted_across_a_resume(make_model, pairs, options):
    def run(bad, **changes):
        return train(
            options(max_nonfinite_steps=3, **changes),
            model=spoil_gradients(make_model(), torch.nan, bad),
            loader=pairs(),
        )

    run({3, 4}, steps=4)

    with pytest.raises(NonFiniteGradients, match="at step 6, the last of 4 steps in a row"):
        run({1, 2, 3}, steps=8, resume="latest")


def test_the_gradient_scaler_finds_its_scale_without_stopping_the_run(make_model, pairs, options):
    model, watch = spoil_gradients(make_model(BALANCED), torch.inf, range(1, 13)), Watch()

    changes = {"precision": "amp", "steps": 14, "max_nonfinite_steps": 0}
    result = train(options(**changes), model=model, loader=pairs(), callbacks=[Every(1, watch)])

    assert result.history[-1]["skipped_steps"] == 12
    assert checkpoint_of(result.directory)["scaler"]["scale"] == 65536 / 2**12
    assert same(watch.states[0], watch.states[11])  # the selection biases too


def test_weights_that_are_not_finite_are_not_written(make_model, pairs, options, model_directory):
    def spoil(model):
        with torch.no_grad():
            model.text_projection[0, 0] = torch.nan

    with pytest.raises(
        NonFiniteWeights, match="text_projection holds values.*at step 6, so it was not saved.*are finite"
    ):
        train(
            options(model=str(model_directory), save_every_n_steps=2),
            model=make_model(),
            loader=pairs(),
            callbacks=[Every(6, spoil)],
        )

    assert checkpoint_of_run(options())["step"] == 4
    assert not (run_directory(options()) / "model").exists()


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(make_model, pairs, options):
    def run(**changes):
        return train(options(**changes), model=make_model(), loader=pairs())

    folder = run().directory / "checkpoints"
    state = torch.load(folder / "epoch_latest.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan)
    for name in ("epoch_latest.pt", "epoch_2.pt"):
        (folder / name).unlink()
        torch.save(state, folder / name)

    with pytest.raises(ValueError, match="epoch_2.pt holds values that are not finite, in the optimizer's exp_avg"):
        run(resume=str(folder / "epoch_2.pt"))
    resumed = run(resume="latest")

    assert "resumed from" in log(resumed.directory) and "epoch_1.pt, because" in log(resumed.directory)
    assert [record["step"] for record in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert checkpoint_of(resumed.directory)["optimizer"]["state"][0]["exp_avg"].isfinite().all()


def test_an_attention_mask_with_infinities_is_accepted(make_model, pairs, options):
    model = make_model()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    assert train(options(), model=model, loader=pairs()).steps == 6


def test_a_nan_batch_leaves_no_trace_in_batch_norms(make_model, pairs, options):
    model = make_model()
    model.visual.conv1 = nn.Sequential(model.visual.conv1, nn.BatchNorm2d(32))
    watch = Watch()

    train(options(logs=None, steps=3), model=model, loader=Poisoned(pairs(), 1), callbacks=[Every(1, watch)])  # step 2

    assert same(watch.states[0], watch.states[1])
    name = "visual.conv1.1.running_mean"
    assert watch.states[2][name].isfinite().all() and not torch.equal(watch.states[2][name], watch.states[1][name])
