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
from gpu_choices import USUAL, measure
from gpu_kernels import Launch, ceilings, launches, predictions
from gpu_model import predict, products

LAYER = (24, 16, 32, 2, 2)
PREDICTED = (100_000, 768, 3072, 8)


@pytest.mark.interpreter
def test_every_launch_of_both_passes_is_there_runs_and_has_a_prediction_of_its_bytes(monkeypatch):
    monkeypatch.setattr(gpu_model, "predict", lambda product, l2: gpu_model.Prediction(*[product.dram_bytes] * 6))
    predicted = predictions(*LAYER, 7.5e12)
    table = {launch.name: launch for launch in launches(*LAYER, torch.float16, "cpu")}
    assert list(table) == [
        "router_logits", "topk_gating", "dispatch", "project_in", "project_in, z kept", "project_rows", "combine",
        "project_back", "gate_gradient", "expert_gradients", "project_rows, dx", "gather_sum", "topk_gating_backward",
        "router_logits_backward", "sum of x's gradients", "torch, in", "torch, out",
    ]  # fmt: skip
    product = 2 * 48 * 16 * 32
    assert [launch.flops / product for launch in table.values()] == [0, 0, 0, 1, 1, 1, 0, 1, 0, 2, 1, 0, 0, 0, 0, 1, 1]
    for name, launch in table.items():
        launch.run()
        assert launch.bytes > 0 and (name in predicted) == ("torch" not in name)
        assert not launch.flops or launch.bytes == predicted.get(name, launch.bytes), name


@pytest.mark.interpreter
def test_ceilings_read_and_copy_what_they_say():
    copy, read, product = ceilings("cpu", torch.float16, size=16, copied=1 << 16)
    assert torch.equal(copy.run(), torch.ones(1 << 14)) and copy.bytes == 1 << 17
    assert read.bytes == 4 * 4096 * 2 * gpu_kernels.PASSES
    read.run()
    assert product.run().shape == (16, 16) and product.flops == 2 * 16**3


def fails():
    raise RuntimeError("no such instruction\nwith a long log")


@pytest.fixture
def a_card(monkeypatch):
    monkeypatch.setattr(harness, "require_device", lambda device: None)
    monkeypatch.setattr(harness, "processor_name", lambda device: "a card")


def left_out(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]


def test_a_launch_that_fails_is_named_and_what_is_measured_is_written_at_once(a_card, monkeypatch, capsys, tmp_path):
    written = tmp_path / "kernels.csv"

    def launches(*which):
        assert [line.split(",")[0] for line in written.read_text().splitlines()] == ["launch", "copy"]
        yield Launch("project_in", 1e9, 1e6, lambda: None)
        yield Launch("project_back", 1e9, 1e6, fails)
        yield Launch("gather_sum", 0, 1e6, lambda: None)

    card = types.SimpleNamespace(major=9, multi_processor_count=gpu_model.MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(gpu_kernels, "clock", lambda run, device: run() or 1e-3)
    found = [Launch("copy", 0, 1e9, lambda: None), Launch("L2 read", 0, 1e9, fails)]
    monkeypatch.setattr(gpu_kernels, "ceilings", lambda *which: found)
    monkeypatch.setattr(gpu_kernels, "launches", launches)
    assert gpu_kernels.main(["--csv", str(written)]) == 1
    assert [line.split(":")[1].strip() for line in left_out(capsys)] == ["L2 read", "predictions", "project_back"]
    names = [line.split(",")[0] for line in written.read_text().splitlines()]
    assert names == ["launch", "copy", "project_in", "gather_sum"]


def test_a_choice_that_fails_is_named_and_the_others_are_measured_and_written(a_card, monkeypatch, capsys, tmp_path):
    written = tmp_path / "choices.csv"

    def comparisons(*which):
        yield "project_in", lambda: {USUAL: lambda: None, "128x256": None}
        assert len(written.read_text().splitlines()) == 3  # before the next launch is measured
        yield "project_back", lambda: {USUAL: fails}
        yield "both passes", lambda: {USUAL: lambda: None}

    monkeypatch.setattr(gpu_choices, "comparisons", comparisons)
    alternate = gpu_choices.alternate
    monkeypatch.setattr(gpu_choices, "alternate", lambda runs, usual, *_: alternate(runs, usual, 0, "cpu", 2))
    assert gpu_choices.main(["--csv", str(written)]) == 1
    assert left_out(capsys) == ["left out: project_back: RuntimeError: no such instruction"]
    rows = [line.split(",")[1:4] for line in written.read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["project_in", "project_in", "both passes"]
    assert rows[1] == ["project_in", "128x256", "left out"]
    assert measure({USUAL: lambda: None}, 0, "cpu", min_rounds=2)[0]["ratio"] == "1.0000"


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_choice_is_compared_with_the_usual_one_and_runs():
    every = gpu_choices.comparisons((16, 32, 2, 1), 24, torch.float16, "cpu", 1)
    found = {launch: prepare() for launch, prepare in every}
    kernels = ["project_in", "project_rows", "project_back", "project_rows_transposed", "expert_gradients"]
    assert list(found) == [*kernels, "both passes"]
    for launch, runs in found.items():
        assert list(runs)[0] == USUAL and None not in runs.values(), launch  # each has run once, to be compared
    for run in (*found["both passes"].values(), found["expert_gradients"]["a launch for each weight"]):
        run()
    assert all("weights by descriptors" in found[launch] for launch in kernels[:4])


@pytest.mark.parametrize(("training", "number"), [(False, 2), (True, 6)])
def test_a_launch_takes_at_least_as_long_as_everything_that_bounds_it_and_products_do_the_flops_of_the_layer(
    training, number
):
    flops_per_ms = gpu_model.TENSOR_FLOPS * gpu_model.MULTIPROCESSORS * gpu_model.CLOCK / 1e3
    found = [predict(product, 7.5e12) for product in products(*PREDICTED, training)]
    assert all(one.total > max(one.tensor, one.l2, one.dram) > 0 for one in found)
    flops = sum(one.tensor for one in found) * flops_per_ms
    assert flops == pytest.approx(number * 2 * 100_000 * 768 * 3072, rel=0.01)


def test_the_ratio_to_dense_k_depends_on_the_rate_of_its_products(capsys):
    ratios = []
    for rate in ("650", "800"):
        gpu_model.main(["--cublas", rate])
        told = [line for line in capsys.readouterr().out.splitlines() if "of dense_k" in line]
        ratios += [float(line.split(", ")[1].split()[0]) for line in told]
    assert ratios == [1.04, 1.02, 1.21, 1.18]  # docs/kernels.md


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_launch_of_a_pass_is_timed_without_a_gpu():
    program = Path(gpu_model.__file__).parent / "gpu_host.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(program.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(program), "--calls", "5"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = {line[:18].strip(): line[18:].split() for line in run.stdout.splitlines()[-3:]}
    launched = {name: int(values[0]) for name, values in rows.items()}
    assert launched == {"routing": 6, "experts, forward": 3, "experts, backward": 5}
    assert all(float(values[1]) > 1 for values in rows.values())
