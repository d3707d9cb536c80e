"""Models of clipup in CLIP_benchmark, from the command line and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import benchmark_layouts as layouts
import pytest
import torch

from clipup.cli import main
from clipup.inference.prepared_experts import PreparedMoE
from clipup.moe.layer import moe_layers


def benchmark(*arguments):
    command = [sys.executable, "-m", "clipup", "clip-benchmark", "eval", *map(str, arguments), "--num_workers", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WAYS = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}
TYPED = ["--model_type", "clipup", "--recall_k", 1, 5, 10]
RECALLS = {f"{ours}_R@{k}": f"{theirs}@{k}" for ours, theirs in WAYS.items() for k in (1, 5, 10)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "their_name", "our_name", "flags", "part", "metrics"),
    [
        (layouts.coco, "mscoco_captions", "coco", TYPED, "retrieval", RECALLS),
        (partial(layouts.webdataset, retrieval=False), "wds/words", "webdataset", [], "zero_shot", {"top1": "acc1"}),
    ],
)
def test_clip_benchmark_measures_the_same_as_clipup_eval(
    directory, tmp_path, capsys, layout, their_name, our_name, flags, part, metrics
):
    root, out = layout(tmp_path / "data"), tmp_path / "theirs.json"
    given = ["--model", directory, "--dataset", their_name, "--dataset_root", root, "--no_amp", *flags]
    benchmark(*given, "--output", out)
    theirs = json.loads(out.read_text())
    options = ["--dataset", our_name, "--root", str(root), "--json", "-", "--device", "cpu", "--workers", "0"]

    assert main(["eval", str(directory), *options]) == 0
    found = json.loads(capsys.readouterr().out)[part]

    assert theirs["pretrained"] == ""  # no tag was given, and none is recorded
    for ours, name in metrics.items():
        assert found[ours] == pytest.approx(theirs["metrics"][name])


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
