"""Models in int8 are saved and loaded as integers, without their plain weights, and compute the same."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from benchmark_layouts import picture
from safetensors.torch import load_file, save_file
from sparse_clip import sparse_clip, sparse_config
from tiny_clip import CONFIGS, tiny_clip, tiny_config

import clipup
import clipup_kernels
from clipup.cli import main
from clipup.clip.inputs import encoders, random_inputs
from clipup.models.model_directory import CONFIG_NAME, WEIGHTS_NAME
from clipup.search import ImageIndex

pytestmark = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ quantizes weights")
MATRIX = "visual.transformer.resblocks.0.mlp.in_weight"
CONFIG = clipup.MoEConfig(num_experts=3, shared_expert=True)


@torch.inference_mode()
def features(model, dtype=torch.float32):
    inputs = [each.to(dtype) if each.is_floating_point() else each for each in random_inputs(model, 3)]
    return [encode(each) for encode, each in zip(encoders(model).values(), inputs, strict=True)]


def in_int8(kind="gelu", sparse=True, dtype=torch.float32, **options):
    model = clipup.upcycle(tiny_clip(kind), CONFIG) if sparse else tiny_clip(kind)
    return clipup.accelerate(model.eval().to(dtype), weights="int8", **options)


@pytest.fixture
def saved(tmp_path):
    clipup.save_pretrained(in_int8(), tmp_path / "model", tiny_config())
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_model_computes_the_same_bit_for_bit(kind, sparse, dtype, tmp_path):
    model = in_int8(kind, sparse, dtype)
    clipup.save_pretrained(model, tmp_path, tiny_config(kind))
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path), precision="bf16" if dtype.itemsize == 2 else "fp32")
    assert all(map(torch.equal, features(loaded, dtype), features(model, dtype)))
    assert clipup.accelerate_report(loaded) == clipup.accelerate_report(model)
    assert getattr(loaded, "moe_config", None) == getattr(model, "moe_config", None)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_norms_in_open_clips_half_precision_are_loaded_as_they_are(precision, tmp_path):
    name = "clipup-tiny-32"
    plain, *_ = clipup.create_model_and_transforms(name, load_weights=False, precision=precision)
    model = clipup.accelerate(plain.eval(), weights="int8")
    clipup.save_pretrained(model, tmp_path, clipup.get_model_config(name))
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path), require_pretrained=True)
    dtype = open_clip.get_input_dtype(precision)
    assert all(map(torch.equal, features(loaded, dtype), features(model, dtype)))
    assert str(loaded) == str(model)


def test_a_layer_that_was_left_for_its_hook_is_loaded_plain(tmp_path):
    plain = tiny_clip()
    plain.visual.transformer.resblocks[1].mlp.register_forward_hook(lambda layer, args, output: None)
    model = clipup.accelerate(plain, weights="int8")
    clipup.save_pretrained(model, tmp_path, tiny_config())
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path))
    assert all(map(torch.equal, features(loaded), features(model)))


def test_calibration_and_excluded_layers_are_saved(tmp_path):
    batches = [random_inputs(tiny_clip(), 200)]
    with pytest.warns(UserWarning, match="saw fewer than 256 rows"):
        model = in_int8(calibrate=batches, exclude=["visual.*1.attn"])
    for directory in (tmp_path / "one", tmp_path / "two"):
        clipup.save_pretrained(model, directory, tiny_config())
        loaded, *_ = clipup.create_model_and_transforms(str(directory))
        assert all(map(torch.equal, features(loaded), features(model)))
        assert clipup.accelerate_report(loaded) == clipup.accelerate_report(model)
        assert max(row.error or 0 for row in clipup.accelerate_report(loaded)) > 0
        model = loaded
    one, two = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


ON_TIER = """
import pickle, sys, torch
import clipup
directory, pickled, inputs = pickle.load(sys.stdin.buffer)
loaded = clipup.create_model_and_transforms(directory)[0]
with torch.inference_mode():
    assert torch.equal(loaded.encode_text(inputs), pickle.loads(pickled).encode_text(inputs))
"""


def test_a_model_loads_on_another_cpu(saved):
    model, *_ = clipup.create_model_and_transforms(str(saved))
    content = pickle.dumps((str(saved), pickle.dumps(model), random_inputs(model, 2)[1]))
    environment = os.environ | {"CLIPUP_CPU_ISA": "portable", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ON_TIER], input=content, env=environment, check=True)


def test_a_loaded_model_holds_no_plain_weights_and_is_for_inference_alone(saved):
    loaded, *_ = clipup.create_model_and_transforms(str(saved))
    assert not any(parameter.dim() == 3 for parameter in loaded.parameters())
    assert {load_file(saved / WEIGHTS_NAME)[name].dtype for name in (MATRIX, f"{MATRIX}_scale")} == {
        torch.int8,
        torch.float32,
    }
    for call in (loaded.train, loaded.state_dict, lambda: loaded.load_state_dict({})):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(ValueError, match="model was prepared by clipup"):
        clipup.upcycle(loaded)
    with pytest.raises(RuntimeError, match="Missing key"):
        open_clip.create_model_and_transforms(f"local-dir:{saved}")


def test_a_config_of_another_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model_cfg describes another model"):
        clipup.save_pretrained(in_int8(), tmp_path / "model", tiny_config("quick_gelu"))
    assert not (tmp_path / "model").exists()


def change_config(directory, **values):
    config = json.loads((directory / CONFIG_NAME).read_text())
    config["quantization_config"] |= values
    (directory / CONFIG_NAME).write_text(json.dumps(config))


def change_tensor(directory, name, change):
    tensors = {key: value.clone() for key, value in load_file(directory / WEIGHTS_NAME).items()}
    value = change(tensors.pop(name))
    save_file(tensors if value is None else {**tensors, name: value}, directory / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda to: change_config(to, version=2), "quantization_config .* install a newer one"),
        (lambda to: change_config(to, quant_method="gptq"), "quantization_config is .*gptq"),
        (lambda to: os.truncate(to / WEIGHTS_NAME, 50_000), "is not a complete safetensors file"),
        (lambda to: change_tensor(to, MATRIX, lambda value: None), f"{MATRIX} is missing"),
        (lambda to: change_tensor(to, f"{MATRIX}_scale", lambda value: None), f"{MATRIX}_scale is missing"),
        (lambda to: change_tensor(to, "ln_final.weight", lambda value: None), "ln_final.weight is missing"),
        (lambda to: change_tensor(to, MATRIX, lambda value: value[1:].clone()), rf"{MATRIX} is \[127, 32\]"),
        (lambda to: change_tensor(to, MATRIX, torch.Tensor.int), f"{MATRIX} is torch.int32"),
        (lambda to: change_tensor(to, f"{MATRIX}_scale", torch.Tensor.half), f"{MATRIX}_scale is torch.float16"),
    ],
)
def test_damaged_and_foreign_files_are_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        clipup.create_model_and_transforms(str(saved))
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("force_image_size", 32), ("force_quick_gelu", True), ("precision", "bf16"), ("device", "cuda")),
        ("moe_cfg", clipup.MoEConfig()),
    ],
)
def test_arguments_that_would_change_the_model_are_refused(saved, name, value):
    with pytest.raises(ValueError, match=f"^{name} "):
        clipup.create_model_and_transforms(str(saved), **{name: value})


# ---------------------------------------------------------------- commands


@pytest.fixture
def plain(tmp_path):
    clipup.save_pretrained(clipup.upcycle(tiny_clip(), CONFIG), tmp_path / "plain", tiny_config())
    return tmp_path / "plain"


@pytest.mark.parametrize("source", ["directory", "checkpoint", "int8"])
def test_convert_quantizes_every_model(source, plain, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = in_int8()
    if source == "checkpoint":
        state = {"state_dict": load_file(plain / WEIGHTS_NAME), "epoch": 1}
        torch.save(state | json.loads((plain / CONFIG_NAME).read_text()), tmp_path / "epoch_1.pt")
    given = {"directory": plain, "checkpoint": tmp_path / "epoch_1.pt", "int8": saved}[source]
    assert main(["convert", "--int8", str(given), str(tmp_path / "out")]) == 0
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path / "out"))
    assert all(map(torch.equal, features(loaded), features(expected)))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("convert --int8 ViT-B-32 out", "pretrained is missing"),
        ("convert --int8 nothing out", "'nothing' is neither"),
        ("convert ViT-B-32 out --pretrained x", "--pretrained has no effect without --int8"),
        ("upcycle saved out", "model was prepared by clipup.accelerate"),
        ("export saved out", "model was prepared by clipup.accelerate"),
        ("train --model saved --train-data x.csv --precision fp32", "model was prepared by clipup.accelerate"),
        ("inspect saved --captions x.csv --out out", "model is in int8"),
        ("index . out --model saved --precision fp32", "precision must be int8 or None: the model is in int8"),
        ("eval saved --precision bf16 --val-data x.csv", "precision is 'bf16'"),
    ],
)
def test_what_int8_cannot_do_is_refused_in_one_line(line, named, saved, monkeypatch, capsys):
    monkeypatch.chdir(saved.parent)
    saved.rename("saved")
    picture(1).save("cat.jpg")
    Path("x.csv").write_text("filepath\ttitle\ncat.jpg\ta cat\n")
    assert main(line.split()) == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


def test_an_int8_directory_is_evaluated_and_searched_as_the_plain_model_in_int8(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clipup.save_pretrained(sparse_clip(), "plain", sparse_config())
    assert main(["convert", "--int8", "plain", "quantized"]) == 0
    for name in ("red", "green", "blue"):
        Path("images", name).mkdir(parents=True)
        picture(len(name)).save(f"images/{name}/1.png")
    Path("classes.txt").write_text("red\ngreen\nblue\n")
    found = {}
    for model, *int8 in (("plain", "int8"), ("quantized",)):
        index = ["index", "images", f"index-{model}", "--model", model, "--workers", "0"]
        assert main(index + ["--precision", *int8] * len(int8)) == main(["search", f"index-{model}", "red"]) == 0
        capsys.readouterr()
        evaluation = ["eval", model, "--classes", "classes.txt", "--images", "images", "--out", "-", "--workers", "0"]
        assert main(evaluation + ["--int8"] * len(int8)) == 0
        results = json.loads(capsys.readouterr().out)
        found[model] = ImageIndex.load(f"index-{model}").features, results["zero_shot"], results["precision"]
    assert torch.equal(found["quantized"][0], found["plain"][0]) and found["quantized"][1:] == found["plain"][1:]
    assert found["plain"][2] == "fp32, int8 weights"
