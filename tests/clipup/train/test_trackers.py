"""Numbers of a run for wandb and trackio, which stub modules stand for."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import open_clip
import pytest

import clipup
from clipup.train import train

SPARSE = clipup.MoEConfig(num_experts=2)


@pytest.fixture
def stub(monkeypatch):
    """A module of this name that records the calls of its functions."""

    def install(name):
        calls = []

        def recorded(function):
            return lambda *args, **kwargs: calls.append((function, args, kwargs))

        module = SimpleNamespace(**{function: recorded(function) for function in ("init", "log", "finish")})
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    monkeypatch.delenv("WANDB_MODE", raising=False)
    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_logged_step_and_evaluation_is_reported(stub, make_model, pairs, options, csv_data, name):
    calls = stub(name)
    result = train(
        options(report_to=name, wandb_project_name="moe", val_data=csv_data, steps=3),
        model=make_model(SPARSE),
        preprocess=open_clip.image_transform(16, is_train=False),
        tokenizer=open_clip.SimpleTokenizer(context_length=8),
        loader=pairs(),
    )

    (start, *logs, end) = calls
    assert start[0] == "init" and end == ("finish", (), {}) and {call[0] for call in logs} == {"log"}
    settings = start[2]
    assert (settings["project"], settings["name"]) == ("moe", "run") and settings["config"]["lr"] == 1e-3
    steps = [(args[0], kwargs["step"]) for _, args, kwargs in logs]
    losses = {step: numbers["train/loss"] for numbers, step in steps if "train/loss" in numbers}
    assert losses == {record["step"]: record["loss"] for record in result.history}
    assert [numbers["val/text_to_image_R@1"] for numbers, _ in steps if "val/text_to_image_R@1" in numbers] == [
        result.evaluations[0]["text_to_image_R@1"]
    ]
    layer = next(iter(clipup.moe_layers(result.model)))
    assert f"train/layers/{layer}/load/1" in steps[0][0]


def test_wandb_is_offline_unless_the_environment_says_otherwise(stub, make_model, pairs, options, monkeypatch):
    calls = stub("wandb")
    run = options(report_to="all", wandb_notes="a note", steps=1)
    train(run, model=make_model(), loader=pairs())
    first = calls[0][2]
    assert (first["mode"], first["notes"], first["id"], first["resume"]) == ("offline", "a note", "run", "allow")
    assert first["dir"] == f"{run.logs}/run"

    monkeypatch.setenv("WANDB_MODE", "online")
    train(options(report_to="wandb", name="other", steps=1), model=make_model(), loader=pairs())
    assert [kwargs["mode"] for function, _, kwargs in calls if function == "init"] == ["offline", "online"]


def test_a_resumed_run_continues_its_trackio_run(stub, make_model, pairs, options):
    calls = stub("trackio")
    train(options(report_to="trackio", steps=2), model=make_model(), loader=pairs())
    train(options(report_to="trackio", steps=4, resume="latest"), model=make_model(), loader=pairs())

    assert [kwargs["resume"] for function, _, kwargs in calls if function == "init"] == ["never", "allow"]
    assert [kwargs["step"] for function, _, kwargs in calls if function == "log"] == [1, 2, 3, 4]
