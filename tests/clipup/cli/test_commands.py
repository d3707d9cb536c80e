import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.cli import COMMANDS, main
from clipup.cli.upcycle import check_step0
from clipup.models import known_models

ROOT = Path(__file__).parents[3]


@pytest.fixture
def dense(tmp_path):
    directory = tmp_path / "dense"
    save_pretrained(tiny_clip(), directory, tiny_config())
    return directory


def test_upcycle_writes_a_model_and_reports_the_step_zero_check(dense, tmp_path, capsys):
    out = tmp_path / "sparse"
    assert main(["upcycle", str(dense), str(out), "--num-experts", "3", "--blocks", "0", "2"]) == 0
    report = capsys.readouterr().out
    assert "largest difference of normalized features at step 0: " in report
    assert float(report.split("at step 0: ")[1].split()[0]) <= 1e-6
    sparse, *_ = clipup.create_model_and_transforms(str(out))
    assert sparse.moe_config == MoEConfig.clip_up(num_experts=3, blocks=(0, 2), towers=("image", "text"))
    original, *_ = clipup.create_model_and_transforms(str(dense))
    assert step0_difference(original, sparse) <= 1e-6


def test_upcycle_initializes_the_same_routers_for_the_same_seed(dense, tmp_path):
    def routers(name, seed):
        assert main(["upcycle", str(dense), str(tmp_path / name), "--seed", seed]) == 0
        model, *_ = clipup.create_model_and_transforms(str(tmp_path / name))
        return [layer.router.weight for layer in moe_layers(model).values()]

    first, again, other = routers("a", "1"), routers("b", "1"), routers("c", "2")
    assert all(x.equal(y) and not x.equal(z) for x, y, z in zip(first, again, other, strict=True))


def test_step_zero_check_refuses_models_that_differ():
    with pytest.raises(ValueError, match="features differ from the dense model's by 1.0e-02.*nothing was saved"):
        check_step0(0.01, MoEConfig())
    with pytest.raises(ValueError, match="differ"):
        check_step0(float("nan"), MoEConfig())
    assert check_step0(0.01, MoEConfig(normalize_gates="none")) == 0.01


def test_debug_shows_the_traceback(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPUP_DEBUG", "1")
    assert main(["flops", "no-such-model"]) == 2
    assert "Traceback" in capsys.readouterr().err


def run_without_torch(tmp_path, *arguments):
    """Runs a command in a process in which Ctrl-C comes while torch is imported."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "clipup", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["flops", "ViT-B-32"], "clipup flops"),
        (["train", "--model", "ViT-B-32"], "clipup train"),
        (["--version"], "clipup"),
    ],
)
def test_interrupt_while_torch_is_imported_prints_no_traceback(tmp_path, arguments, program):
    result = run_without_torch(tmp_path, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", f"{program}: interrupted\n")


def test_helps_and_typos_are_answered_without_torch(tmp_path):
    """One process for all: each command's help, and models that do not exist."""
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

helps = [f"{command} --help" for command in COMMANDS if command != "clip-benchmark"]  # whose help is its own
print(json.dumps({line: run(line) for line in [*helps, "--help", "upcicle", *sys.argv[1:]]}))
"""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    unknown = [
        *("eval ViT-B-61 --val-data a.csv", "upcycle ViT-B-61 out", "train --model ViT-B-61 --train-data a.csv"),
        *("index photos out --model ViT-B-61", "flops ViT-B-61", "plan --model ViT-B-61 --gpus 8 --batch 8"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", program, *unknown], env=environment, capture_output=True, text=True, check=True
    )
    for line, (code, out) in json.loads(done.stdout).items():
        if line == "--help":
            assert code == 0 and all(f"\n  {command} " in out for command in COMMANDS)
        elif line.endswith("--help"):
            assert code in (0, None) and "usage: clipup" in out, line
        else:
            expected = "did you mean 'upcycle'" if line == "upcicle" else "'ViT-B-61' is neither an open_clip model"
            assert code == 2 and expected in out, line


def test_models_are_known_by_their_files_as_by_open_clip():
    assert known_models.packaged() == set(open_clip.list_models())


def test_flops_prints_only_json(capsys, caplog):
    assert main(["flops", "ViT-B-16", "--moe", "--json"]) == 0
    captured = capsys.readouterr()
    counts = json.loads(captured.out)
    assert list(counts) == ["image_gflops", "text_gflops", "params", "active_params"]
    assert counts["image_gflops"] + counts["text_gflops"] == pytest.approx(54.2, rel=0.01)
    assert counts["active_params"] == pytest.approx(191e6, rel=0.01)
    assert captured.err == caplog.text == ""
    assert main(["flops", "ViT-B-16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == pytest.approx(150e6, rel=0.01)


def test_upcycle_accepts_every_option_as_a_flag(dense, tmp_path, capsys):
    flags = ["--blocks", "every", "--last-blocks", "3", "--num-experts", "16", "--top-k", "8", "--granularity", "4"]
    flags += ["--shared-expert", "--score-function", "sigmoid"]
    flags += ["--selection-bias", "z_score", "--selection-bias-rate", "0.01"]
    assert main(["upcycle", str(dense), str(tmp_path / "out"), *flags]) == 0
    assert float(capsys.readouterr().out.split("at step 0: ")[1].split()[0]) <= 1e-6
    assert main(["upcycle", str(dense), str(tmp_path / "reinitialized"), "--reinit-ratio", "0.5"]) == 0
    assert float(capsys.readouterr().out.split("at step 0: ")[1].split()[0]) > 1e-3
    sparse, *_ = clipup.create_model_and_transforms(str(tmp_path / "out"))
    assert sparse.moe_config == MoEConfig.clip_up(
        blocks="every", last_blocks=3, num_experts=16, top_k=8, granularity=4, shared_expert=True,
        score_function="sigmoid", selection_bias="z_score", selection_bias_rate=0.01, towers=("image", "text"),
    )  # fmt: skip


def test_flops_of_a_sparse_directory(tmp_path, capsys):
    save_pretrained(upcycle(tiny_clip(), MoEConfig(num_experts=2)), tmp_path, tiny_config())
    assert main(["flops", str(tmp_path), "--moe", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (
        counts["params"]
        == counts["active_params"]
        == sum(p.numel() for p in clipup.create_model_and_transforms(str(tmp_path))[0].parameters())
    )
    assert main(["flops", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["image", "MoE"]
