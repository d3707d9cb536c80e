"""Programs about Triton's kernels, without a GPU: predictions, tables of launches and of choices, and host times."""

import os
import subprocess
import sys
import types
from pathlib import Path

import gpu_choices
import gpu_kernels
import gpu_model
import harness
import pytest
import torch
from gpu_choices import USUAL
from gpu_kernels import Launch, ceilings, launches, predictions

LAYER = (24, 16, 32, 2, 2)


@pytest.mark.interpreter
def test_every_launch_of_both_passes_is_there_runs_and_has_a_prediction():
    every = list(launches(*LAYER, torch.float16, "cpu"))
    assert {launch.name for launch in every} == {*predictions(*LAYER, l2=7.5e12), "torch, in", "torch, out"}
    assert sum(launch.flops for launch in every) == 9 * 2 * 48 * 16 * 32
    for launch in (*ceilings("cpu", torch.float16, size=16, copied=1 << 16), *every):
        launch.run()
        assert launch.bytes > 0


def fails():
    raise RuntimeError("no such instruction\nwith a long log")


@pytest.fixture
def a_card(monkeypatch):
    monkeypatch.setattr(harness, "require_device", lambda device: None)
    monkeypatch.setattr(harness, "processor_name", lambda device: "a card")
    card = types.SimpleNamespace(major=9, multi_processor_count=gpu_model.MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def first_columns(written, number):
    return [line.split(",")[:number] for line in written.read_text().splitlines()[1:]]


def test_a_launch_that_fails_is_named_and_what_is_measured_is_written_at_once(a_card, monkeypatch, capsys, tmp_path):
    written = tmp_path / "kernels.csv"

    def launches(*which):
        assert first_columns(written, 1) == [["copy"], ["L2 read"]]
        yield Launch("project_in", 1e9, 1e6, lambda: None)
        yield Launch("project_back", 1e9, 1e6, fails)

    monkeypatch.setattr(gpu_kernels, "clock", lambda run, device: run() or 1e-3)
    rates = [Launch(name, 0, 1e9, lambda: None) for name in ("copy", "L2 read")]
    monkeypatch.setattr(gpu_kernels, "ceilings", lambda *which: rates)
    monkeypatch.setattr(gpu_kernels, "launches", launches)
    assert gpu_kernels.main(["--csv", str(written)]) == 1
    assert "left out: project_back: RuntimeError: no such instruction\n" in capsys.readouterr().out
    assert first_columns(written, 2) == [["copy", "1.0000"], ["L2 read", "1.0000"], ["project_in", "1.0000"]]
    ratio = 1 / predictions(50_000, 768, 3072, 8, 2, l2=1e12, dram=1e12)["project_in"]
    assert f",{ratio:.2f}," in written.read_text().splitlines()[-1]


def test_choices_that_cannot_run_or_fail_are_named_and_the_others_measured(a_card, monkeypatch, capsys, tmp_path):
    def comparisons(*which):
        yield "project_in", lambda: {USUAL: lambda: None, "128x256": None}
        yield "project_back", lambda: {USUAL: fails}
        yield "project_rows", lambda: {USUAL: lambda: None}

    monkeypatch.setattr(gpu_choices, "comparisons", comparisons)
    alternate = gpu_choices.alternate
    monkeypatch.setattr(gpu_choices, "alternate", lambda runs, usual, *_: alternate(runs, usual, 0, "cpu", 2))
    written = tmp_path / "choices.csv"
    assert gpu_choices.main(["--csv", str(written)]) == 1
    assert "left out: project_back: RuntimeError: no such instruction\n" in capsys.readouterr().out
    rows = [(launch, choice, ms == "left out") for launch, choice, ms in first_columns(written, 3)]
    assert rows == [("project_in", USUAL, False), ("project_in", "128x256", True), ("project_rows", USUAL, False)]


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_choice_is_compared_with_the_usual_one_and_runs():
    every = gpu_choices.comparisons((16, 32, 2, 1), 24, torch.float16, "cpu", 1)
    prepared = {launch: prepare() for launch, prepare in every}
    kernels = ["project_in", "project_rows", "project_back", "project_rows_transposed", "expert_gradients"]
    assert list(prepared) == kernels
    for launch, runs in prepared.items():
        assert list(runs)[0] == USUAL and None not in runs.values(), launch  # each has run once, to be compared
    prepared["expert_gradients"]["a launch for each weight"]()
    assert all("weights by descriptors" in prepared[launch] for launch in kernels[:4])


@pytest.mark.parametrize(("training", "number"), [(False, 2), (True, 6)])
def test_a_launch_takes_at_least_as_long_as_what_bounds_it_and_products_do_the_flops_of_the_layer(training, number):
    every = list(gpu_model.launches(50_000, 768, 3072, 8, 2, training))
    predicted = [gpu_model.predict(launch, 7.5e12) for launch in every]
    few = {launch.name: launch.tile for launch in gpu_model.launches(1024, 768, 3072, 8, 2, training)}
    assert few["project_rows"].block_n < next(launch.tile.block_n for launch in every if launch.name == "project_rows")
    assert all(time.total > max(time.tensor, time.shared, time.l2, time.dram) > 0 for time in predicted)
    in_one_step = next(
        time for launch, time in zip(every, predicted, strict=True) if launch.name.startswith("project_in")
    )
    assert in_one_step.shared / in_one_step.tensor == pytest.approx(640 / 512)  # 80 KB at 128 bytes a cycle
    flops_per_ms = gpu_model.TENSOR_FLOPS * gpu_model.MULTIPROCESSORS * gpu_model.CLOCK / 1e3
    for flops in (sum(launch.flops for launch in every), sum(time.tensor for time in predicted) * flops_per_ms):
        assert flops == pytest.approx(number * 2 * 100_000 * 768 * 3072, rel=0.01)


def test_predictions_depend_on_the_rates_of_the_card_as_the_documentation_says(capsys):
    times, ratios = [], []
    for rates in ([], ["--l2", "6.5"], ["--memory", "3.8"]):
        gpu_model.main(rates)
        told = [line for line in capsys.readouterr().out.splitlines() if "of dense_k" in line]
        times += [float(line.split(", ")[0].split()[-1]) for line in told]
        ratios += [float(line.split(", ")[1].split()[0]) for line in told]
    assert times == [2.01, 5.97, 2.30, 6.81, 1.97, 5.84]  # docs/gpu_kernels.md
    assert ratios == [1.13, 1.10, 1.29, 1.26, 1.21, 1.18]


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_launch_of_a_pass_is_timed_without_a_gpu():
    program = Path(gpu_model.__file__).parent / "gpu_host.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(program.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(program), "--calls", "5"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [line.rsplit(maxsplit=3) for line in run.stdout.splitlines()[-3:]]
    launched = {name: int(number) for name, number, us, _ in rows if float(us) > 1}
    assert launched == {"routing": 6, "experts, forward": 3, "experts, backward": 5}
