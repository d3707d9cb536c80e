"""clipup's models in CLIP_benchmark, from the command line and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import benchmark_layouts as layouts
import pytest

from clipup.cli import main

KS = ("1", "5", "10")


def benchmark(*arguments):
    command = [sys.executable, "-m", "clipup", "benchmark", "eval", *map(str, arguments), "--num_workers", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name, ours", [("mscoco_captions", "coco"), ("flickr30k", "flickr30k")])
def test_clip_benchmark_measures_what_clipup_eval_does(directory, tmp_path, capsys, name, ours):
    root = getattr(layouts, ours)(tmp_path / "data")
    options = ["--model_type", "clipup", "--model", directory, "--dataset", name, "--dataset_root", root, "--no_amp"]
    benchmark(*options, "--recall_k", *KS, "--output", tmp_path / "theirs.json")
    theirs = json.loads((tmp_path / "theirs.json").read_text())["metrics"]

    arguments = ["eval", str(directory), "--dataset", ours, "--root", str(root), "--json", "-", "--device", "cpu"]
    assert main([*arguments, "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)["retrieval"]

    assert (found["gallery"], found["captions"]) == (12, 60)
    for k in KS:
        assert found["t2i"][f"r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
        assert found["i2t"][f"r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
    assert found["t2i"]["r5"] < 1


def test_clip_benchmark_classifies_under_autocast_with_clipup_as_the_default_type(directory, tmp_path, capsys):
    root = layouts.webdataset(tmp_path / "data", retrieval=False)
    options = ["--model", directory, "--dataset", "wds/words", "--dataset_root", root]
    benchmark(*options, "--output", tmp_path / "theirs.json")
    theirs = json.loads((tmp_path / "theirs.json").read_text())["metrics"]

    arguments = ["eval", str(directory), "--dataset", "webdataset", "--root", str(root), "--json", "-"]
    assert main([*arguments, "--device", "cpu", "--precision", "amp_bf16"]) == 0
    found = json.loads(capsys.readouterr().out)["zero_shot"]

    assert found["top1"] == pytest.approx(theirs["acc1"], abs=1 / 12)  # bfloat16 may turn one answer
    assert (found["images"], found["classes"]) == (12, 3)


def test_importing_the_module_registers_the_type(directory):
    from clip_benchmark import models

    import clipup.evaluate.clip_benchmark  # noqa: F401

    assert models.MODEL_TYPES.count("clipup") == 1
    model, transform, tokenizer = models.load_clip("clipup", str(directory), "", cache_dir=None, device="cpu")
    image = transform(layouts.picture(0))[None]
    assert model.encode_image(image).shape == model.encode_text(tokenizer(["a cat"])).shape
