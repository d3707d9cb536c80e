"""Gradients, losses and weights that are NaN or infinite: what is skipped, what stops a run, what is never written."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import clipup
from clipup.train import Every, NonFiniteGradients, NonFiniteWeights, train
from clipup.train.checkpoints.format import load

BALANCED = clipup.MoEConfig.clip_up(num_experts=4, selection_bias="sign")


def spoil_gradients(model, value, steps):
    """Gives one weight a gradient of this value in these steps (from 1 on), under a loss that is finite."""
    calls = []

    def spoil(gradient):
        calls.append(len(calls) + 1)
        return torch.full_like(gradient, value) if calls[-1] in steps else gradient

    model.visual.proj.register_hook(spoil)
    return model


def watch(states):
    """Callbacks that keep the model's state after every step."""
    return [Every(1, lambda model: states.append(deepcopy(model.state_dict())))]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def latest(directory):
    return load(directory / "checkpoints" / "epoch_latest.pt")


@pytest.mark.parametrize(
    "settings", [{"accum_freq": 2}, {"precision": "amp", "grad_clip_norm": 1.0}, {"precision": "amp_bf16"}], ids=str
)
def test_a_step_with_a_nan_batch_is_not_applied_and_the_run_continues(make_model, pairs, options, settings):
    states, accum = [], settings.get("accum_freq", 1)
    model = make_model(None if settings.get("precision") == "amp" else BALANCED)
    model.visual.conv1 = nn.Sequential(model.visual.conv1, nn.BatchNorm2d(32))
    loader = list(pairs(pairs=64 * accum))
    loader[3 * accum][0].fill_(torch.nan)  # step 4

    usual = {"steps": 8, "eps": 1e-4, "save_frequency": 0, "save_most_recent": False}
    result = train(options(**usual, **settings), model=model, loader=loader, callbacks=watch(states))

    before, skipped, after = states[2:5]
    assert same(before, skipped) and not same(skipped, after)  # batch norms and selection biases too
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    counts = [record["skipped_steps"] for record in result.history]
    assert counts[3] == counts[2] + 1 == counts[-1]
    assert counts[2] == 0 or "amp" in settings.values()  # where the scaler has looked for its scale
    assert [record["loss"] is None for record in result.history] == [False] * 3 + [True] + [False] * 4
    assert latest(result.directory)["optimizer"]["state"][0]["step"] == 8 - counts[-1]
    assert "step 4 not applied: its gradient norm is nan (1 in a row" in (result.directory / "out.log").read_text()
    assert "NaN" not in (result.directory / "metrics.jsonl").read_text()


def test_too_many_such_steps_in_a_row_also_over_a_resume_stop_the_run_and_leave_a_finite_checkpoint(
    make_model, pairs, options
):
    def run(bad, **changes):
        settings = options(max_nonfinite_steps=3, save_every_n_steps=1, **changes)
        return train(settings, model=spoil_gradients(make_model(), torch.inf, bad), loader=pairs())

    run({2, 3, 4}, steps=4)

    with pytest.raises(NonFiniteGradients, match="inf at step 5, the last of 4 steps in a row.*max_nonfinite_steps=3"):
        run({1, 2, 3}, steps=8, resume="latest")
    directory = Path(options().checkpoints.logs) / "run"
    state = latest(directory)
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["state_dict"].values())


def test_the_gradient_scaler_finds_its_scale_without_stopping_the_run(make_model, pairs, options):
    model, states = spoil_gradients(make_model(BALANCED), torch.inf, range(1, 13)), []

    changes = {"precision": "amp", "steps": 14, "max_nonfinite_steps": 0}
    result = train(options(**changes), model=model, loader=pairs(), callbacks=watch(states))

    assert result.history[-1]["skipped_steps"] == 12
    assert latest(result.directory)["scaler"]["scale"] == 65536 / 2**12
    assert same(states[0], states[11])


def test_weights_that_are_not_finite_are_not_written(make_model, pairs, options, model_directory):
    def spoil(model):
        with torch.no_grad():
            model.text_projection[0, 0] = torch.nan

    model = make_model()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))  # is none of them
    with pytest.raises(NonFiniteWeights, match="text_projection holds values.*at step 6, so it was not saved"):
        train(options(save_every_n_steps=2), model=model, loader=pairs(), callbacks=[Every(6, spoil)])

    directory = Path(options().checkpoints.logs) / "run"
    assert latest(directory)["step"] == 4 and not (directory / "model").exists()


def test_an_optimizer_whose_state_is_not_finite_is_not_written(run, options):
    def spoil(optimizer, args, kwargs):
        next(iter(optimizer.state.values()))["exp_avg"].fill_(torch.nan)

    with (
        register_optimizer_step_post_hook(spoil),
        pytest.raises(NonFiniteWeights, match="the optimizer's exp_avg of parameter 0 holds.*so it was not saved"),
    ):
        run(steps=1)

    assert not any((Path(options().checkpoints.logs) / "run" / "checkpoints").iterdir())
