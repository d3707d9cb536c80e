"""``clipup export``: programs that compute what the model does, for batches of other sizes."""

import subprocess
import sys

import open_clip
import pytest
import torch
from tiny_clip import tiny_config
from tiny_families import TIMM, timm_model

import clipup
from clipup import MoEConfig, upcycle
from clipup.cli import main
from clipup.clip.inputs import random_inputs
from clipup.models.exporting import save_encoders


@pytest.fixture(params=[pytest.param("dense", marks=pytest.mark.slow), "sparse"])
def directory(request, tmp_path):
    config = tiny_config()
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 2
    model = open_clip.CLIP(**config)
    if request.param == "sparse":
        model = upcycle(model, MoEConfig.clip_up(num_experts=4))
    clipup.save_pretrained(model, tmp_path / "model", config)
    return tmp_path / "model"


def test_both_encoders_are_written_and_take_any_batch(directory, tmp_path, capsys):
    out = tmp_path / "programs"
    assert main(["export", str(directory), str(out)]) == 0
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert written.keys() == {"image.pt2", "text.pt2"}
    assert main(["export", str(directory), str(out)]) == 2
    assert "image.pt2, text.pt2; pass --overwrite" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    model, *_ = clipup.create_model_and_transforms(str(directory))
    for count in (1, 5):
        for name, inputs in zip(("image", "text"), random_inputs(model, count), strict=True):
            program = torch.export.load(out / f"{name}.pt2").module()
            torch.testing.assert_close(program(inputs), getattr(model, f"encode_{name}")(inputs))


def test_programs_of_another_model_do_not_stay_beside_new_ones(tmp_path):
    (tmp_path / "text.pt2").write_text("of a model with texts")
    images_only = upcycle(timm_model(next(iter(TIMM))), MoEConfig(towers=("image",), num_experts=4))
    assert set(save_encoders(images_only, tmp_path)) == {"image"}
    assert [path.name for path in tmp_path.iterdir()] == ["image.pt2"]


LOADER = """
import sys, torch
import clipup_kernels
from torch._inductor import aoti_load_package
inputs = torch.load(sys.argv[1])
torch.save({name: aoti_load_package(f"{sys.argv[2]}/{name}.pt2")(value) for name, value in inputs.items()}, sys.argv[3])
"""


@pytest.mark.slow
def test_compiled_programs_run_with_a_batch_they_were_not_made_with(directory, tmp_path):
    assert main(["export", str(directory), str(tmp_path / "programs"), "--aot"]) == 0
    model, *_ = clipup.create_model_and_transforms(str(directory))
    inputs = dict(zip(("image", "text"), random_inputs(model, 7), strict=True))
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", LOADER, tmp_path / "inputs.pt", tmp_path / "programs", tmp_path / "outputs.pt"]
    subprocess.run([str(part) for part in command], check=True)
    for name, found in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(found, getattr(model, f"encode_{name}")(inputs[name]))
