"""The table of choices: every one that docs/kernels.md decides about is there, runs, and is compared with the usual."""

import gpu_choices
import pytest
import torch
from gpu_choices import USUAL, comparisons, measure

from clipup_kernels.triton import configs

pytestmark = pytest.mark.interpreter


def test_a_launch_that_fails_is_named_and_the_others_are_measured_and_written(monkeypatch, capsys, tmp_path):
    def fails():
        raise RuntimeError("no such instruction\nwith a long log")

    def comparisons(*which):
        yield "project_in", lambda: {USUAL: lambda: None, "128x256": lambda: None}
        assert len((tmp_path / "choices.csv").read_text().splitlines()) == 3  # before the next launch is measured
        yield "project_back", lambda: {USUAL: fails}
        yield "expert_gradients", fails
        yield "both passes", lambda: {USUAL: lambda: None}

    monkeypatch.setattr(gpu_choices, "comparisons", comparisons)
    monkeypatch.setattr(gpu_choices, "require_device", lambda device: None)
    monkeypatch.setattr(gpu_choices, "processor_name", lambda device: "a card")
    alternate = gpu_choices.alternate
    monkeypatch.setattr(gpu_choices, "alternate", lambda runs, usual, *_: alternate(runs, usual, 0, "cpu", 2))
    assert gpu_choices.main(["--csv", str(tmp_path / "choices.csv")]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert told == [
        "left out: project_back: RuntimeError: no such instruction",
        "left out: expert_gradients: RuntimeError: no such instruction",
    ]
    lines = (tmp_path / "choices.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] for line in lines] == ["project_in", "project_in", "both passes"]


def test_a_choice_that_cannot_run_is_named_without_a_time():
    usual, absent = measure({USUAL: lambda: None, "wrong": None}, 0, "cpu", min_rounds=2)
    assert usual["ratio"] == "1.0000" and (absent["choice"], absent["ms"]) == ("wrong", "left out")


@pytest.mark.slow
def test_every_choice_is_compared_with_the_usual_one_and_runs():
    found = {launch: prepare() for launch, prepare in comparisons((16, 32, 2, 1), 24, torch.float16, "cpu", 1)}
    products = ["project_in", "project_rows", "project_back", "project_rows_transposed", "expert_gradients"]
    assert list(found) == [*products, "both passes"]
    for launch, runs in found.items():
        assert list(runs)[0] == USUAL and None not in runs.values(), launch  # each has run once, to be compared
    for run in (*found["both passes"].values(), found["expert_gradients"]["a launch for each weight"]):
        run()
    assert all("weights by descriptors" in found[launch] for launch in products[:4])


def test_tiles_of_both_widths_are_compared_with_and_without_descriptors():
    for kernel, depth, columns, widths in (
        ("project_in", 768, 3072, [128, 256, 128]), ("project_rows", 3072, 768, [256, 128, 256]),
    ):  # fmt: skip
        tiles = gpu_choices.choices(kernel, configs.heuristic(90, kernel, "half", "many", depth, columns))
        assert [tile.block_n for tile in tiles.values()] == widths
        assert [tile.descriptors for tile in tiles.values()] == [False, False, True]
