"""Models of clipup in CLIP_benchmark, from the command line and without a network."""

import json
import os
import subprocess
import sys
from functools import partial

import benchmark_layouts as layouts
import pytest

from clipup.cli import main


def benchmark(*arguments):
    program = [sys.executable, "-m", "clipup.evaluate.clip_benchmark", "eval", "--model_type", "clipup"]
    command = [*program, "--pretrained", "", *map(str, arguments), "--num_workers", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WAYS = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}
RECALL_AT = ["--recall_k", 1, 5, 10]
RECALLS = {f"{ours}_R@{k}": f"{theirs}@{k}" for ours, theirs in WAYS.items() for k in (1, 5, 10)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "their_name", "our_name", "flags", "part", "metrics"),
    [
        (layouts.coco, "mscoco_captions", "coco", RECALL_AT, "retrieval", RECALLS),
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

    for ours, name in metrics.items():
        assert found[ours] == pytest.approx(theirs["metrics"][name])
