"""Models of clipup in CLIP_benchmark, from the command line and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import benchmark_layouts as layouts
import pytest
import torch

from clipup.cli import main
from clipup.inference.prepared_experts import PreparedMoE
from clipup.moe.layer import moe_layers

KS = ("1", "5", "10")
OURS = ["--json", "-", "--device", "cpu", "--workers", "0"]


def benchmark(*arguments):
    command = [sys.executable, "-m", "clipup", "clip-benchmark", "eval", *map(str, arguments), "--num_workers", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_clip_benchmark_measures_the_same_recall_as_clipup_eval(directory, tmp_path, capsys):
    root = layouts.coco(tmp_path / "data")
    options = ["--model_type", "clipup", "--model", directory, "--dataset", "mscoco_captions", "--dataset_root", root]
    benchmark(*options, "--no_amp", "--recall_k", *KS, "--output", tmp_path / "theirs.json")
    theirs = json.loads((tmp_path / "theirs.json").read_text())["metrics"]

    assert main(["eval", str(directory), "--dataset", "coco", "--root", str(root), *OURS]) == 0
    found = json.loads(capsys.readouterr().out)["retrieval"]

    assert (found["gallery"], found["captions"]) == (12, 60)
    for k in KS:
        assert found[f"text_to_image_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
        assert found[f"image_to_text_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
    assert 0 < found["text_to_image_R@5"] < 1


@pytest.mark.slow
def test_clip_benchmark_measures_the_same_accuracy_as_clipup_eval(directory, tmp_path, capsys):
    root = layouts.webdataset(tmp_path / "data", retrieval=False)
    options = ["--model", directory, "--dataset", "wds/words", "--dataset_root", root]
    benchmark(*options, "--no_amp", "--output", tmp_path / "theirs.json")
    theirs = json.loads((tmp_path / "theirs.json").read_text())

    assert main(["eval", str(directory), "--dataset", "webdataset", "--root", str(root), *OURS]) == 0
    found = json.loads(capsys.readouterr().out)["zero_shot"]

    assert theirs["pretrained"] == ""  # no tag was given, and none is recorded
    assert found["top1"] == pytest.approx(theirs["metrics"]["acc1"])
    assert (found["images"], found["classes"]) == (12, 3)


def test_a_loaded_model_runs_under_clip_benchmarks_autocast(directory, tmp_path):
    import clip_benchmark.cli
    import clip_benchmark.models

    import clipup.evaluate.clip_benchmark  # noqa: F401

    model, transform, tokenizer = clip_benchmark.models.load_clip("clipup", str(directory), "", None, "cpu")
    with torch.no_grad(), torch.autocast("cpu"):
        assert model.encode_text(tokenizer(["a cat"])).isfinite().all()


def test_on_a_cpu_the_command_line_prepares_its_model_and_uses_no_autocast(directory, monkeypatch):
    import clipup.evaluate.clip_benchmark as ours

    seen = []

    def main():
        model, _, _ = ours.registry.load_clip("clipup", str(directory), "", None, "cpu")
        seen.append((sys.argv, {type(layer) for layer in moe_layers(model).values()}))

    monkeypatch.setattr(ours.cli, "main", main)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ours.run(["eval", "--model", str(directory)])
    (argv, layers), registered = seen[0], ours.registry.TYPE2FUNC["clipup"]
    assert "--no_amp" in argv and layers == {PreparedMoE}
    assert registered is ours.load  # in Python autocast is the caller's choice
