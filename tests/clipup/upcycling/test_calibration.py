"""Calibration: re-initialized experts are fitted to the dense MLPs."""

import copy

import pytest
import torch
from PIL import Image
from sparse_clip import dense_clip, sparse_config
from tiny_clip import tiny_clip
from tiny_hugging_face import tiny_hugging_face

from clipup import MoEConfig, calibrate, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.cli import main
from clipup.clip.inputs import random_inputs
from clipup.upcycling import calibration

CONFIG = MoEConfig.clip_up(num_experts=4, reinit_ratio=0.5)


def batches(model, steps, size=16):
    return [random_inputs(model, size, seed=seed) for seed in range(steps)]


@pytest.mark.parametrize(
    "options",
    [{}, {"shared_expert": True, "padding_aware": False}, pytest.param({"granularity": 2}, marks=pytest.mark.slow)],
)
def test_calibration_reduces_the_error_on_unseen_inputs(options):
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG.replace(**options))
    before = copy.deepcopy(sparse)
    errors = calibrate(sparse, dense, batches(dense, 40))
    assert set(errors) == set(moe_layers(sparse)) and all(len(values) == 40 for values in errors.values())
    fresh = [random_inputs(dense, 32, seed=1000)]
    for name, (error,) in calibrate(copy.deepcopy(sparse), dense, fresh).items():
        (at_start,) = calibrate(copy.deepcopy(before), dense, fresh)[name]
        assert error < 0.5 * at_start, name
    assert step0_difference(dense, sparse) < step0_difference(dense, before)


def test_the_teacher_of_expert_choice_is_the_dense_function(monkeypatch):
    dense, teachers = tiny_clip(), []
    monkeypatch.setattr(calibration, "run_batches", lambda teacher, batches: teachers.append(teacher))
    sparse = upcycle(dense, MoEConfig(num_experts=4, routing="expert_choice", capacity_factor=0.5))
    with pytest.raises(ValueError, match="nothing was calibrated"):
        calibrate(sparse, dense, [])
    assert step0_difference(dense, teachers[0]) < 1e-5


@pytest.mark.parametrize(("factor", "expected"), [(1, 0), (2, 1)])
def test_error_is_relative_and_squared_and_zero_for_copies(factor, expected):
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG.replace(reinit_ratio=0.0))
    with torch.no_grad():
        for layer in moe_layers(sparse).values():
            layer.out_weight.mul_(factor)
            layer.out_bias.mul_(factor)
    for (error,) in calibrate(sparse, dense, batches(dense, 1)).values():
        assert error == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_only_experts_change_and_they_stay_different():
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG)
    before, dense_before = copy.deepcopy(sparse.state_dict()), copy.deepcopy(dense.state_dict())
    calibrate(sparse, dense, batches(dense, 5))
    prefixes = tuple(f"{name}." for name in moe_layers(sparse))
    for name, value in sparse.state_dict().items():
        is_expert = name.startswith(prefixes) and "router" not in name
        assert torch.equal(value, before[name]) != is_expert, name
    assert all(torch.equal(value, dense_before[name]) for name, value in dense.state_dict().items())
    assert sparse.training and dense.training and not any(p.grad is not None for p in sparse.parameters())
    layer = next(iter(moe_layers(sparse).values()))
    assert (layer.in_weight[0] - layer.in_weight[1]).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda dense, sparse: {"model": dense}, ValueError, "model"),
        (lambda dense, sparse: {"batches": []}, ValueError, "batches"),
        (lambda dense, sparse: {"dense": tiny_clip("custom_text")}, ValueError, "dense"),
        (lambda dense, sparse: {"model": sparse.requires_grad_(False)}, ValueError, "model"),
        (
            lambda dense, sparse: {"model": upcycle(other := tiny_hugging_face("CLIPModel"), CONFIG), "dense": other},
            TypeError,
            "model is one of transformers",
        ),
        (lambda dense, sparse: {"lr": 1e30}, FloatingPointError, "lr"),
    ],
)
def test_unsupported_arguments_are_refused(change, error, named):
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG)
    with pytest.raises(error, match=named):
        calibrate(**{"model": sparse, "dense": dense, "batches": batches(dense, 8)} | change(dense, sparse))


def test_command_line_calibrates_and_prints_the_errors(tmp_path, capsys):
    save_pretrained(dense_clip(), tmp_path / "dense", sparse_config())
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "data.csv").write_text("filepath,title\n" + f"{tmp_path / 'red.png'},a red square\n" * 12)
    command = ["upcycle", *map(str, (tmp_path / "dense", tmp_path / "out", "--calibrate-data", tmp_path / "data.csv"))]
    assert main(command) == 2 and "set --reinit-ratio" in capsys.readouterr().err  # for copies there is nothing to do
    options = [
        "--reinit-ratio",
        "0.5",
        "--csv-separator",
        ",",
        "--calibrate-steps",
        "10",
        "--calibrate-batch-size",
        "4",
    ]
    assert main([*command, *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "squared error" in line]
    assert len(lines) == 4
    for line in lines:
        before, after = (float(part.split()[0]) for part in line.split("squared error ")[1].split("before, "))
        assert after < before
