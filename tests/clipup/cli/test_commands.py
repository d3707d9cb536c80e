import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from PIL import Image
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, save_pretrained, step0_difference, upcycle
from clipup.cli import COMMANDS, main
from clipup.models import known_models

ROOT = Path(__file__).parents[3]


@pytest.fixture
def dense(tmp_path):
    directory = tmp_path / "dense"
    save_pretrained(tiny_clip(), directory, tiny_config())
    return directory


def test_upcycle_takes_every_option_as_a_flag_and_reports_the_step_zero_check(dense, tmp_path, capsys):
    def difference(name, *flags):
        assert main(["upcycle", str(dense), str(tmp_path / name), *flags]) == 0
        return float(capsys.readouterr().out.split("normalized features at step 0: ")[1].split()[0])

    flags = ["--blocks", "every", "--last-blocks", "3", "--num-experts", "16", "--top-k", "8", "--granularity", "4"]
    flags += ["--shared-expert", "--score-function", "sigmoid"]
    flags += ["--selection-bias", "z_score", "--selection-bias-rate", "0.01"]
    assert difference("out", *flags) <= 1e-6 and difference("reinitialized", "--reinit-ratio", "0.5") > 1e-3
    sparse, *_ = clipup.create_model_and_transforms(str(tmp_path / "out"))
    assert sparse.moe_config == MoEConfig.clip_up(
        blocks="every", last_blocks=3, num_experts=16, top_k=8, granularity=4, shared_expert=True,
        score_function="sigmoid", selection_bias="z_score", selection_bias_rate=0.01, towers=("image", "text"),
    )  # fmt: skip
    original, *_ = clipup.create_model_and_transforms(str(dense))
    assert step0_difference(original, sparse) <= 1e-6


def test_upcycle_initializes_the_same_routers_for_the_same_seed(dense, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["upcycle", str(dense), str(tmp_path / name), "--seed", seed]) == 0
    first, again, other = ((tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


@pytest.mark.parametrize(
    ("difference", "flags", "code"), [(0.01, [], 2), (float("nan"), [], 2), (0.01, ["--normalize-gates", "none"], 0)]
)
def test_a_model_that_differs_at_step_zero_is_not_saved(dense, tmp_path, monkeypatch, difference, flags, code):
    monkeypatch.setattr("clipup.upcycling.step0.step0_difference", lambda *_: difference)
    assert main(["upcycle", str(dense), str(tmp_path / "out"), *flags]) == code
    assert (tmp_path / "out").exists() == (code == 0)


def test_debug_shows_the_traceback(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPUP_DEBUG", "1")
    assert main(["flops", "no-such-model"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def without_torch(tmp_path):
    """Runs Python in a process in which Ctrl-C comes while torch is imported."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    return lambda *arguments: subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "program"),
    [("flops ViT-B-32", "clipup flops"), ("train --model ViT-B-32", "clipup train"), ("--version", "clipup")],
)
def test_interrupt_while_torch_is_imported_prints_no_traceback(without_torch, arguments, program):
    result = without_torch("-m", "clipup", *arguments.split())
    assert (result.returncode, result.stdout, result.stderr) == (130, "", f"{program}: interrupted\n")


def test_helps_and_wrong_commands_are_answered_without_torch(without_torch):
    """One process for all."""
    program = """
import contextlib, io, json, sys
from clipup.cli import COMMANDS, main

def run(line):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(line.split())
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue()

helps = [f"{command} --help" for command in COMMANDS]
print(json.dumps({line: run(line) for line in [*helps, "--help", "upcicle"]}))
"""
    for line, (code, out) in json.loads(without_torch("-c", program).stdout).items():
        if line == "--help":
            assert code == 0 and all(f"\n  {command} " in out for command in COMMANDS)
        elif line == "upcicle":
            assert code == 2 and "did you mean 'upcycle'" in out
        else:
            assert code in (0, None) and "usage: clipup" in out, line


def test_models_are_known_by_their_files_as_by_open_clip():
    assert known_models.packaged() == set(open_clip.list_models())


def flops(capsys, *arguments):
    assert main(["flops", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flops_prints_the_counts_of_a_dense_model_and_of_what_it_becomes(capsys):
    counts = flops(capsys, "ViT-B-16", "--moe")
    assert list(counts) == ["image_gflops", "text_gflops", "params", "active_params"]
    assert counts["image_gflops"] + counts["text_gflops"] == pytest.approx(54.2, rel=0.01)
    assert counts["active_params"] == pytest.approx(191e6, rel=0.01)
    assert flops(capsys, "ViT-B-16")["params"] == pytest.approx(150e6, rel=0.01)


def test_flops_of_a_sparse_directory(tmp_path, capsys):
    sparse = upcycle(tiny_clip(), MoEConfig(num_experts=2))
    save_pretrained(sparse, tmp_path, tiny_config())
    counts = flops(capsys, str(tmp_path), "--moe")
    assert counts["params"] == counts["active_params"] == sum(p.numel() for p in sparse.parameters())
    assert main(["flops", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["image", "MoE"]


@pytest.mark.parametrize("command", ["upcycle clipup-tiny-32 out", "eval clipup-tiny-32 --val-data x.csv --device cpu"])
def test_pretrained_may_be_a_directory(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("cat.png")
    Path("x.csv").write_text("filepath\ttitle\ncat.png\tred apple\n")
    dense, *_ = clipup.create_model_and_transforms("clipup-tiny-32", load_weights=False)
    clipup.save_pretrained(dense, "run/model", clipup.get_model_config("clipup-tiny-32"))
    for directory in ("run", "run/model"):
        assert main([*command.replace("out", f"out-{len(directory)}").split(), "--pretrained", directory]) == 0
