"""A router that collapses is reported once; one that does not is not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import clipup
from clipup.moe.layer import moe_layers
from clipup.train import train
from clipup.train.log import routing_collapse

CONFIG = clipup.MoEConfig(num_experts=8, top_k=2, capacity_factor=1.0)
HALF_THE_ROOM = CONFIG.replace(capacity_factor=0.5)
LAYERS = ["visual.transformer.resblocks.1.mlp", "transformer.resblocks.1.mlp"]
EVEN = [1 / 8] * 8


def collapsed(model: nn.Module) -> nn.Module:
    """Every token chooses the first two experts."""
    with torch.no_grad():
        for name, layer in moe_layers(model).items():
            norm = model.get_submodule(name.removesuffix(".mlp")).ln_2
            norm.weight[0], norm.bias[0] = 1e-3, 3.0  # feature 0 is 3 for every token
            layer.router.weight[:2, 0], layer.router.weight[2:, 0] = 10.0, 0.0
    return model


def records(load, steps, dropped=0.1, odd=range(0)):
    """What a run logs when its first layer is loaded like this and the other one evenly; in ``odd`` steps collapsed."""
    for step in range(1, steps + 1):
        layer = {"load": [0.5, 0.5, *[0] * 6], "dropped": 0.75} if step in odd else {"load": load, "dropped": dropped}
        yield {"step": step, "layers": {LAYERS[0]: layer, LAYERS[1]: {"load": EVEN, "dropped": 0.1}}}


@pytest.fixture
def found(make_model):
    """Where the first layer is reported in these records."""

    def found(logged, config=CONFIG, known=()):
        watch = routing_collapse.CollapseWatch(make_model(config), list(known))
        reports = [report for record in logged for report in watch.observe(record)]
        assert {report["layer"] for report in reports} <= {LAYERS[0]}
        return [report["step"] for report in reports]

    return found


def two_take(share):
    return [share / 2] * 2 + [(1 - share) / 6] * 6


def test_two_of_eight_experts_with_all_tokens_are_reported_once_in_console_log_file_and_result(
    make_model, pairs, options, capsys, monkeypatch
):
    monkeypatch.setattr(routing_collapse, "_STEPS", 10)

    usual = {"lr": 1e-9, "wd": 0.0, "save_frequency": 0}  # the routers stay as they are
    first, result = (
        train(options(**usual, **changes), model=collapsed(make_model(CONFIG)), loader=pairs(batch_size=4, pairs=240))
        for changes in ({"steps": 11}, {"steps": 12, "resume": "latest"})
    )

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    log = [line for line in (result.directory / "out.log").read_text().splitlines() if "| WARNING | routing" in line]
    file = [json.loads(line) for line in (result.directory / "warnings.jsonl").read_text().splitlines()]
    assert len(lines) == len(log) == 1
    assert f"at step 10 in {LAYERS[0]} (2.0 of 8 experts are used" in lines[0] and f"; {LAYERS[1]} (2.0" in lines[0]
    assert lines[0].removeprefix("warning: ") == log[0].split(" | WARNING | ")[1]
    assert [record["layer"] for record in file] == LAYERS and file == first.warnings == result.warnings
    assert [file[0][name] for name in ("step", "experts", "top_k", "dead_experts")] == [10, 8, 2, 6]
    assert file[0]["effective_experts"] == pytest.approx(2) and file[0]["dropped"] == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize(
    "load, dropped, config",
    [
        (two_take(0.9), 0.1, CONFIG),
        (EVEN, 0.65, CONFIG),
        ([1 / 6] * 6 + [0, 0], 0.1, CONFIG),
        (EVEN, 0.85, HALF_THE_ROOM),
    ],
    ids=["two_experts_take_90_percent", "65_percent_are_dropped", "two_dead_experts", "85_percent_in_half_the_room"],
)
def test_each_sign_of_a_collapse_is_reported_for_its_layer_after_100_steps(found, load, dropped, config):
    assert found(records(load, 250, dropped), config) == [100]
    assert found(records(load, 250, dropped), config, known=[{"layer": LAYERS[0]}]) == []


@pytest.mark.parametrize(
    "load, dropped, config, odd",
    [
        ([2 / 8, *[6 / 8 / 7] * 7], 0.3, CONFIG, range(0)),
        ([0.2] * 4 + [0.05] * 4, 0.45, CONFIG, range(0)),
        ([1 / 7] * 7 + [0], 0.2, CONFIG, range(0)),
        (EVEN, 0.1, CONFIG, range(150, 151)),
        (EVEN, 0.1, CONFIG, range(1, 31)),
        (EVEN, 0.6, HALF_THE_ROOM, range(0)),
        ([0.5, 0.5], 0.1, clipup.MoEConfig(num_experts=2, top_k=2), range(0)),
    ],
    ids=[
        "twice_the_mean",
        "half_take_80_percent",
        "one_dead",
        "odd_batch",
        "rough_start",
        "half_the_room",
        "all_chosen",
    ],
)
def test_an_imbalance_of_healthy_runs_is_not_reported(found, load, dropped, config, odd):
    assert found(records(load, 250, dropped, odd), config) == []
