"""The table of choices: every one that docs/kernels.md decides about is there, runs, and is compared with the usual."""

import gpu_choices
import pytest
import torch
from gpu_choices import USUAL, comparisons, measure

from clipup_kernels.triton import configs, tune

pytestmark = pytest.mark.interpreter
DESCRIPTORS = ("weights by descriptors", "rows by descriptors")


@pytest.mark.slow
def test_every_choice_is_compared_with_the_usual_one_and_runs(monkeypatch):
    monkeypatch.setattr(tune, "candidates_both", lambda *which: [None, configs.both_tile(90, 16)])
    layer = ((16, 32, 2, 1), 24)
    gradients = []
    weight_gradient = tune.weight_gradient.weight_gradient
    monkeypatch.setattr(
        tune.weight_gradient,
        "weight_gradient",
        lambda *which, **how: gradients.append(None) or weight_gradient(*which, **how),
    )
    found = {}
    for _, launch, prepare in comparisons(layer, layer, torch.float16, "cpu", 1):
        found[launch] = runs = prepare()
        if launch == "expert_gradients":  # now, as the program does, and not when everything is prepared
            gradients.clear()
            runs["a launch for each weight"]()
            assert len(gradients) == 2
    assert list(found) == [
        "project_in", "project_rows", "project_back", "project_rows_transposed", "expert_gradients", "both passes",
        "both products",
    ]  # fmt: skip
    for launch, runs in found.items():
        assert list(runs)[0] == USUAL and None not in runs.values(), launch  # each has run once, to be compared
    for run in found["both passes"].values():
        run()
    for launch in list(found)[:4]:
        assert len(found[launch]) == 5 and set(DESCRIPTORS) < set(found[launch])
    assert len(found["expert_gradients"]) == 5 and "a launch for each weight" in found["expert_gradients"]
    assert list(found["both passes"])[1:] == ["all weights by descriptors", "all rows by descriptors"]
    assert list(found["both products"]) == [USUAL, "one launch, 128x32, 8 warps, 3 stages"]


def test_a_launch_that_fails_is_named_and_the_others_are_measured_and_written(monkeypatch, capsys, tmp_path):
    def fails():
        raise RuntimeError("no such instruction\nwith a long log")

    def comparisons(*which):
        yield "50x16x32", "project_in", lambda: {USUAL: lambda: None, "128x256": lambda: None}
        assert len((tmp_path / "choices.csv").read_text().splitlines()) == 3  # before the next launch is measured
        yield "50x16x32", "project_back", lambda: {USUAL: fails}
        yield "50x16x32", "expert_gradients", fails
        yield "50x16x32", "both passes", lambda: {USUAL: lambda: None}

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


def test_tiles_of_both_widths_are_compared_with_and_without_descriptors():
    usual = configs.heuristic(90, "project_in", "half", "many", 768, 3072)
    tiles = gpu_choices.choices("project_in", usual)
    assert list(tiles) == [USUAL, "128x256", *DESCRIPTORS, "128x256, rows by descriptors"]
    assert [tile.block_n for tile in tiles.values()] == [128, 256, 128, 128, 256]
    usual = configs.heuristic(90, "project_rows", "half", "many", 3072, 768)
    assert [tile.block_n for tile in gpu_choices.choices("project_rows", usual).values()] == [256, 128, 256, 256, 128]


def test_a_choice_that_cannot_run_is_named_without_a_time():
    usual, absent = measure({USUAL: lambda: None, "wrong": None}, 0, "cpu", min_rounds=2)
    assert usual["ratio"] == "1.0000" and (absent["choice"], absent["ms"]) == ("wrong", "left out")
