"""Where the numbers of a run go: its records, the console, TensorBoard; wandb and trackio, for which stubs stand."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clipup
from clipup import SparseMoE, moe_metrics
from clipup.clip.flops import count
from clipup.train import Every, loop, train
from clipup.train.cards import pairs_per_second_at_peak
from clipup.train.ranks.distributed import Ranks
from clipup.train.step import StepLosses

SPARSE = clipup.MoEConfig(num_experts=2)
RECALL = "text_to_image_R@1"


@pytest.fixture
def metrics():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([SparseMoE(12, 16, num_experts=4) for _ in range(2)])
    for layer in layers:
        layer(torch.randn(20, 12))
    return moe_metrics(layers)


def test_the_record_holds_every_metric_of_every_layer_and_the_means_of_the_scalars(metrics):
    for values in metrics.values():
        del values["expert_indices"]
    losses = StepLosses({"contrastive": torch.tensor(2.0)}, torch.tensor(1.0), torch.tensor(14.0), metrics)
    record = losses.record(Ranks(torch.device("cpu")))

    layers = record.pop("layers")
    for name, values in metrics.items():
        assert layers[name] == {key: pytest.approx(tensor.tolist()) for key, tensor in values.items()}
    scalars = {"loss": 3.0, "contrastive": 2.0, "aux": 1.0, "logit_scale": 14.0}
    for key in ("balance", "z", "dropped", "router_entropy"):
        scalars[key] = pytest.approx(sum(values[key] for values in layers.values()) / 2)
    assert record == scalars


def test_every_metric_in_the_record_is_documented(metrics):
    for name in {name for values in metrics.values() for name in values}:
        assert f"``{name}``" in moe_metrics.__doc__
        assert name == "expert_indices" or f"``{name}``" in clipup.train.__doc__


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

    monkeypatch.setattr(loop, "pairs_per_second_at_peak", lambda *_: at_peak)
    (record,) = train(options(logs=None, steps=1), model=model, loader=pairs()).history
    assert record.get("mfu") == (tflops and pytest.approx(record["images_per_second"] / at_peak))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_the_console_has_the_first_and_the_last_step_or_a_bar_and_every_evaluation(
    make_model, pairs, options, monkeypatch, terminal
):
    console = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    callbacks = [Every(4, lambda model: {RECALL: 0.25, "splits": {"emoji": {RECALL: 0.5}}})]
    train(options(steps=6), model=make_model(), loader=pairs(), callbacks=callbacks)

    lines = console.getvalue().replace("\r", "\n").splitlines()
    assert f"evaluation at step 4: {RECALL} 0.25" in lines
    if terminal:
        assert any(line.startswith("training:   0%|") for line in lines)
        return
    number = r"\d+(\.\d+)?(e-\d+)?"
    of_step = rf"loss {number}, lr {number}, {number} images/s"
    assert re.fullmatch(r"training from step 0 to step 6 on cpu, 1 rank; .*logs/run", lines[0])
    assert re.fullmatch(rf"training: 1 of 6 steps, epoch 0, {of_step}, 00:\d\d left", lines[1])
    assert len(lines) == 5 and re.fullmatch(rf"training: 6 of 6 steps, epoch 1, {of_step}", lines[-1])


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


def test_every_logged_step_and_evaluation_is_reported_to_tensorboard_and_wandb(
    stub, make_model, pairs, options, csv_data, monkeypatch
):
    calls = stub("wandb")
    result = train(
        options(report_to="all", wandb_project_name="moe", wandb_notes="a note", val_data=csv_data, steps=3),
        model=make_model(SPARSE),
        preprocess=open_clip.image_transform(16, is_train=False),
        tokenizer=open_clip.SimpleTokenizer(context_length=8),
        loader=pairs(),
    )

    (start, *logs, end) = calls
    assert start[0] == "init" and end == ("finish", (), {}) and {call[0] for call in logs} == {"log"}
    expected = {"project": "moe", "name": "run", "mode": "offline", "notes": "a note", "id": "run", "resume": "allow"}
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
