"""A router that collapses is reported once; one that does not is not."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import clipup
from clipup.moe.layer import moe_layers
from clipup.train import train
from clipup.train.log.routing_collapse import CollapseWatch

CONFIG = clipup.MoEConfig(num_experts=8, top_k=2, capacity_factor=1.0)
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


def records(load, steps, dropped=0.1, every=1, **others):
    """What a run of ``steps`` steps logs when its first layer is loaded like this and the other one evenly."""
    for step in range(every, steps + 1, every):
        layers = {LAYERS[0]: {"load": load, "dropped": dropped}, LAYERS[1]: {"load": EVEN, "dropped": 0.1}}
        yield {"step": step, "layers": others.get(f"at_{step}", layers)}


@pytest.fixture
def found(make_model):
    """What is reported of these records."""

    def found(logged, config=CONFIG, known=()):
        watch = CollapseWatch(make_model(config), list(known))
        return [report for record in logged for report in watch.observe(record)]

    return found


def two_take(share):
    return [share / 2] * 2 + [(1 - share) / 6] * 6


def test_two_of_eight_experts_with_all_tokens_are_reported_once_in_console_log_file_and_result(
    make_model, pairs, options, capsys
):
    def run(**changes):
        usual = {"lr": 1e-9, "wd": 0.0, "save_frequency": 0}  # the routers stay as they are
        loader = pairs(batch_size=2, pairs=240)
        return train(options(**usual, **changes), model=collapsed(make_model(CONFIG)), loader=loader)

    first = run(steps=102)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    result = run(steps=104, resume="latest")

    log = [line for line in (result.directory / "out.log").read_text().splitlines() if "| WARNING | routing" in line]
    file = [json.loads(line) for line in (result.directory / "warnings.jsonl").read_text().splitlines()]
    assert len(lines) == len(log) == 1
    assert f"routing has collapsed at step 100 in {LAYERS[0]} (2.0 of 8 experts are used, 6 get" in lines[0]
    assert re.search(rf"7\d% of the choices are dropped\); {LAYERS[1]} \(2.0 of 8", lines[0])
    assert lines[0].removeprefix("warning: ") == log[0].split(" | WARNING | ")[1]
    assert [record["layer"] for record in file] == LAYERS and file == first.warnings == result.warnings
    assert [file[0][name] for name in ("step", "experts", "top_k", "dead_experts")] == [100, 8, 2, 6]
    assert file[0]["effective_experts"] == pytest.approx(2) and file[0]["dropped"] == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize(
    "load, dropped",
    [(two_take(0.9), 0.1), (EVEN, 0.65), ([1 / 6] * 6 + [0, 0], 0.1), ([0.5, 0.5] + [0] * 6, 0.0)],
    ids=["two_experts_take_90_percent", "65_percent_are_dropped", "two_dead_experts", "two_experts_take_all"],
)
def test_each_sign_of_a_collapse_is_reported_for_its_layer_after_100_steps(found, load, dropped):
    reports = found(records(load, 300, dropped))

    assert [(report["step"], report["layer"]) for report in reports] == [(100, LAYERS[0])]
    assert found(records(load, 99, dropped)) == []
    assert found(records(load, 300, dropped), known=reports) == []


@pytest.mark.parametrize(
    "load, dropped",
    [([2 / 8, *[6 / 8 / 7] * 7], 0.3), ([0.2] * 4 + [0.05] * 4, 0.45), ([1 / 7] * 7 + [0], 0.2)],
    ids=["largest_twice_the_mean", "half_of_the_experts_take_80_percent", "one_dead_expert"],
)
def test_an_imbalance_of_healthy_runs_is_not_reported(found, load, dropped):
    assert found(records(load, 300, dropped)) == []


def test_a_single_odd_batch_and_a_rough_start_are_not_reported(found):
    odd = {name: {"load": two_take(1.0), "dropped": 0.75} for name in LAYERS}
    assert found(records(EVEN, 300, at_150=odd)) == []
    assert found(records(EVEN, 300, **{f"at_{step}": odd for step in range(1, 31)})) == []


def test_what_the_configuration_makes_unavoidable_is_not_reported(found):
    half_the_room = clipup.MoEConfig(num_experts=8, top_k=2, capacity_factor=0.5)
    assert found(records(EVEN, 200, dropped=0.6), half_the_room) == []
    assert len(found(records(EVEN, 200, dropped=0.85), half_the_room)) == 1
    assert found(records([0.5, 0.5], 200), clipup.MoEConfig(num_experts=2, top_k=2)) == []
