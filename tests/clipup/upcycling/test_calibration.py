"""Calibration: re-initialized experts are fitted to the dense MLPs."""

import copy
import tarfile

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_clip, tiny_config
from tiny_families import HUGGING_FACE, build, hugging_face_cfg
from tiny_hugging_face import tiny_hugging_face

from clipup import MoEConfig, calibrate, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.cli import main
from clipup.clip.inputs import random_inputs

CONFIG = MoEConfig.clip_up(num_experts=4, reinit_ratio=0.5)


def batches(model, steps, size=16):
    return [random_inputs(model, size, seed=seed) for seed in range(steps)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_expert": True},
        {"padding_aware": False},
        pytest.param({"granularity": 2}, marks=pytest.mark.slow),
        pytest.param({"normalize_gates": "none"}, marks=pytest.mark.slow),
    ],
)
def test_calibration_reduces_the_error_on_unseen_inputs(options):
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG.replace(**options))
    before = copy.deepcopy(sparse)
    errors = calibrate(sparse, dense, batches(dense, 60))
    assert set(errors) == set(moe_layers(sparse)) and all(len(values) == 60 for values in errors.values())
    fresh = [random_inputs(dense, 32, seed=1000)]
    for name, (error,) in calibrate(copy.deepcopy(sparse), dense, fresh).items():
        (at_start,) = calibrate(copy.deepcopy(before), dense, fresh)[name]
        assert error < 0.5 * at_start, name
    assert step0_difference(dense, sparse) < step0_difference(dense, before)


def test_error_is_relative_and_squared_and_zero_for_copies():
    dense = tiny_clip()
    exact = upcycle(dense, CONFIG.replace(reinit_ratio=0.0))
    assert all(values[0] < 1e-10 for values in calibrate(exact, dense, batches(dense, 1)).values())
    doubled = upcycle(dense, CONFIG.replace(reinit_ratio=0.0))
    with torch.no_grad():
        for layer in moe_layers(doubled).values():
            layer.out_weight.mul_(2)
            layer.out_bias.mul_(2)
    assert all(
        values[0] == pytest.approx(1, rel=1e-4) for values in calibrate(doubled, dense, batches(dense, 1)).values()
    )


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


def test_frozen_tower_is_unchanged():
    dense = tiny_clip()
    dense.visual.requires_grad_(False)
    sparse = upcycle(dense, CONFIG)
    before = copy.deepcopy(sparse.visual.state_dict())
    errors = calibrate(sparse, dense, batches(dense, 3))
    assert errors and not any(name.startswith("visual") for name in errors)
    assert all(torch.equal(value, before[name]) for name, value in sparse.visual.state_dict().items())


def test_family_whose_mlp_is_two_modules_is_calibrated(tmp_path):
    dense = build(hugging_face_cfg(HUGGING_FACE["BertLayer"](), tmp_path))
    sparse = upcycle(dense, CONFIG.replace(towers=("text",)))
    (values,) = calibrate(sparse, dense, batches(dense, 60)).values()
    assert values[-1] < 0.7 * values[0]


def test_unsupported_arguments_are_refused():
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG)
    with pytest.raises(ValueError, match=r"model has no sparse layers from clipup\.upcycle"):
        calibrate(dense, dense, batches(dense, 1))
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(sparse, dense, [])
    with pytest.raises(ValueError, match="upcycling dense gives .*visual.*: pass the model that it was upcycled from"):
        calibrate(sparse, tiny_clip("custom_text"), [])
    with pytest.raises(ValueError, match="no expert of model has requires_grad=True"):
        calibrate(copy.deepcopy(sparse).requires_grad_(False), dense, batches(dense, 1))
    with pytest.raises(FloatingPointError, match=r"the error of .*mlp is (nan|inf) at step \d+; lower lr"):
        calibrate(sparse, dense, batches(dense, 8), lr=1e30)


@pytest.fixture
def dense_directory(tmp_path):
    cfg = tiny_config()
    cfg["text_cfg"] |= {"vocab_size": 49408}
    torch.manual_seed(0)
    save_pretrained(open_clip.CLIP(**cfg), tmp_path / "dense", cfg)
    return str(tmp_path / "dense")


@pytest.fixture
def csv_data(tmp_path):
    rows = ["filepath\ttitle"]
    for index in range(12):
        Image.new("RGB", (16, 16), (20 * index, 255 - 20 * index, 90)).save(tmp_path / f"{index}.png")
        rows.append(f"{tmp_path / f'{index}.png'}\tcolour number {index}")
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    return str(tmp_path / "data.csv")


def test_command_line_calibrates_and_prints_the_errors(dense_directory, csv_data, tmp_path, capsys):
    command = ["upcycle", dense_directory, str(tmp_path / "out"), "--reinit-ratio", "0.5", "--calibrate-data", csv_data]
    assert main([*command, "--calibrate-steps", "20", "--calibrate-batch-size", "4"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "squared error" in line]
    assert len(lines) == 4
    for line in lines:
        before, after = (float(part.split()[0]) for part in line.split("squared error ")[1].split("before, "))
        assert after < before


def test_command_line_refuses_to_calibrate_copies(dense_directory, csv_data, tmp_path, capsys):
    assert main(["upcycle", dense_directory, str(tmp_path / "out"), "--calibrate-data", csv_data]) == 2
    assert "they are copies of the dense MLP; set --reinit-ratio, or omit --calibrate-data" in capsys.readouterr().err


def test_command_line_runs_a_pipe_only_where_it_is_allowed(dense_directory, csv_data, tmp_path, capsys):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for index in range(12):
            (tmp_path / f"{index}.txt").write_text(f"colour number {index}")
            tar.add(tmp_path / f"{index}.png", f"{index}.png")
            tar.add(tmp_path / f"{index}.txt", f"{index}.txt")
    trace = tmp_path / "trace"
    pipe = f"pipe:touch {trace}; cat {tmp_path}/train.tar"
    command = ["upcycle", dense_directory, str(tmp_path / "out"), "--reinit-ratio", "0.5", "--calibrate-data", pipe]
    command += ["--calibrate-steps", "2", "--calibrate-batch-size", "4"]
    assert main(command) == 2
    assert "--allow-pipe" in capsys.readouterr().err and not trace.exists()
    assert main([*command, "--allow-pipe"]) == 0
    assert trace.exists()


def test_models_of_transformers_are_refused_by_name():
    dense = tiny_hugging_face("CLIPModel")
    sparse = upcycle(dense, CONFIG)
    with pytest.raises(TypeError, match="calibration of transformers' models is not supported; use open_clip's"):
        calibrate(sparse, dense, [])
