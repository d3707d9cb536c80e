"""Where the numbers of a run go: its records, the console, TensorBoard; wandb and trackio, for which stubs stand."""

import io
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from platforms import linux_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clipup
from clipup.clip.flops import count
from clipup.train import Every, run, train
from clipup.train.cards import pairs_per_second_at_peak
from clipup.train.log.records import Recorder

SPARSE = clipup.MoEConfig(num_experts=2)
RECALL = "text_to_image_R@1"


@pytest.mark.parametrize("name, tflops", [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None)])
def test_mfu_is_of_three_forward_passes_a_pair_on_the_card_with_the_devices_name(
    make_model, pairs, options, monkeypatch, name, tflops
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    model = make_model()
    gflops = count(model).image_gflops + count(model).text_gflops
    at_peak = pairs_per_second_at_peak(model, torch.device("cuda"), 4)
    assert at_peak == (tflops and pytest.approx(4 * tflops * 1000 / (3 * gflops)))
    assert pairs_per_second_at_peak(model, torch.device("cpu"), 4) is None
    model.visual.requires_grad_(False)  # then a forward pass is all that it needs
    gflops = count(model).image_gflops + 3 * count(model).text_gflops
    locked = pairs_per_second_at_peak(model, torch.device("cuda"), 4)
    assert locked == (tflops and pytest.approx(4 * tflops * 1000 / gflops))
    model.visual.requires_grad_(True)

    monkeypatch.setattr(run, "pairs_per_second_at_peak", lambda *_: at_peak)
    (record,) = train(options(logs=None, steps=1), model=model, loader=pairs()).history
    assert record.get("mfu") == (tflops and pytest.approx(record["images_per_second"] / at_peak))


def test_the_console_has_the_first_and_the_last_step_and_every_evaluation(make_model, pairs, options, monkeypatch):
    console = io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    callbacks = [Every(4, lambda model: {RECALL: 0.25, "splits": {"emoji": {RECALL: 0.5}}})]
    train(options(steps=6), model=make_model(), loader=pairs(), callbacks=callbacks)

    lines = console.getvalue().replace("\r", "\n").splitlines()
    assert f"evaluation at step 4: {RECALL} 0.25" in lines
    number = r"\d+(\.\d+)?(e-\d+)?"
    of_step = rf"loss {number}, lr {number}, {number} images/s"
    assert re.fullmatch(r"training from step 0 to step 6 on cpu, ranks: 1; .*logs/run", lines[0])
    assert re.fullmatch(rf"training: 1 of 6 steps, epoch 0, {of_step}, 00:\d\d left", lines[1])
    assert len(lines) == 5 and re.fullmatch(rf"training: 6 of 6 steps, epoch 1, {of_step}", lines[-1])


def test_a_callback_may_return_numbers_of_torch_and_numpy_and_what_json_does_not_have(run, capsys):
    numbers = {"ratio": torch.tensor(0.25), "parts": np.array([0.5, math.nan]), "count": np.int64(3), "of": Path("a")}
    (record,) = run(steps=1, callbacks=[Every(1, lambda model: {"of": numbers})]).evaluations
    assert record["of"] == {"ratio": 0.25, "parts": [0.5, None], "count": 3, "of": "a"}
    assert "evaluation at step 1: of/ratio 0.25, of/parts/0 0.5, of/count 3" in capsys.readouterr().err


def test_the_times_of_the_records_add_up_to_those_of_the_run_also_with_checkpoints_between(run):
    history = run(steps=9, log_every_n_steps=4, save_every_n_steps=3).history
    steps = np.diff([0, *(record["step"] for record in history)])
    assert steps.tolist() == [4, 4, 1]
    assert sum(steps * [record["batch_time"] for record in history]) == pytest.approx(history[-1]["seconds"])


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


def test_every_logged_step_and_evaluation_is_reported_to_tensorboard_and_wandb(stub, run, csv_data):
    calls = stub("wandb")
    noted = {"report_to": "all", "wandb_project_name": "moe", "wandb_notes": "a note"}
    result = run(sparse=SPARSE, val_data=csv_data, steps=3, **noted)

    (start, *logs, end) = calls
    assert start[0] == "init" and end == ("finish", (), {"exit_code": 0}) and {call[0] for call in logs} == {"log"}
    expected = {"project": "moe", "name": "run", "mode": "offline", "notes": "a note", "resume": "allow"}
    assert expected.items() <= start[2].items() and start[2]["config"]["lr"] == 1e-3
    losses = [record["loss"] for record in result.history]
    of_steps = {kwargs["step"]: args[0] for _, args, kwargs in logs if "train/loss" in args[0]}
    assert [of_steps[step]["train/loss"] for step in (1, 2, 3)] == losses
    assert [args[0][f"val/{RECALL}"] for _, args, _ in logs if f"val/{RECALL}" in args[0]] == [
        result.evaluations[0][RECALL]
    ]
    events = EventAccumulator(str(result.directory / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    load = f"train/layers/{next(iter(clipup.moe_layers(result.model)))}/load/1"
    assert load in of_steps[1] and len(events.Scalars(load)) == 3


def test_a_resumed_run_continues_its_trackio_run(stub, make_model, pairs, options):
    calls = stub("trackio")
    train(options(report_to="trackio", steps=2), model=make_model(), loader=pairs())
    train(options(report_to="trackio", steps=4, resume="latest"), model=make_model(), loader=pairs())

    assert [kwargs["resume"] for function, _, kwargs in calls if function == "init"] == ["never", "allow"]
    assert [kwargs["step"] for function, _, kwargs in calls if function == "log"] == [1, 2, 3, 4]


def test_a_wandb_run_is_continued_by_the_same_run_alone_and_fails_with_it(stub, make_model, pairs, options):
    """A new run under the id of another would continue it, and wandb drops the steps that it has already."""
    calls = stub("wandb")
    for changed in ({"steps": 2}, {"steps": 4, "resume": "latest"}, {"steps": 2, "force": True}):
        train(options(report_to="wandb", **changed), model=make_model(), loader=pairs())
    with pytest.raises(ZeroDivisionError):
        train(
            options(report_to="wandb", steps=3, force=True),
            model=make_model(),
            loader=pairs(),
            callbacks=[Every(2, lambda model: 1 // 0)],
        )

    first, resumed, anew, failed = (kwargs["id"] for function, _, kwargs in calls if function == "init")
    assert first == resumed and len({first, anew, failed}) == 3
    assert [kwargs["exit_code"] for function, _, kwargs in calls if function == "finish"] == [0, 0, 0, 1]


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(stub, make_model, pairs, options, monkeypatch, broken):
    calls = stub("wandb")
    monkeypatch.setattr(sys.modules["wandb"], broken, lambda *_, **__: calls.append(broken) or 1 / 0)
    with pytest.warns(RuntimeWarning, match="wandb has failed .*ZeroDivisionError"):
        result = train(options(report_to="wandb", steps=3), model=make_model(), loader=pairs())
    assert result.steps == 3 and calls.count(broken) == 1
    assert "wandb has failed" in (result.directory / "out.log").read_text()


@linux_only
def test_a_full_disk_under_the_log_prints_no_traceback(tmp_path, capsys):
    (tmp_path / "out.log").symlink_to("/dev/full")
    recorder = Recorder(tmp_path)
    recorder.say(logging.ERROR, "a line")
    with pytest.raises(OSError, match="No space left"):
        recorder.close()
    assert capsys.readouterr().err == ""
