"""User errors on the command line: each prints one line that says what to change, with exit code 2."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import open_clip
import pytest
from PIL import Image
from platforms import linux_only
from tiny_clip import tiny_config

import clipup
from clipup import MoEConfig, save_pretrained, upcycle
from clipup.cli import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with models, data and damaged files."""
    root = tmp_path_factory.mktemp("place")
    whole, short = tiny_config(), tiny_config()  # vocabularies: open_clip's, and one that lacks most of it
    whole["text_cfg"] |= {"vocab_size": 49408}
    for config, dense, sparse in ((whole, "dense", "sparse"), (short, "short", "short_sparse")):
        model = open_clip.CLIP(**config)
        save_pretrained(model, root / dense, config)
        save_pretrained(upcycle(model, MoEConfig(num_experts=2)), root / sparse, config)
    for directory in ("jpegs", "empty", "torn", "half_cfg", "cut", "transformers"):
        (root / directory).mkdir()
    Image.new("RGB", (8, 8)).save(root / "jpegs/cat.jpg")
    for name, text in {
        "torn/broken.png": "no png",
        "blank.txt": "\n",
        "transformers/config.json": '{"model_type": "clip"}',
        "x.csv": f"filepath\ttitle\n{root / 'jpegs/cat.jpg'}\ta cat\n",
        "classes.txt": "cat\n",
        "half_cfg/open_clip_config.json": '{"model_cfg": {"embed_dim": 4}}',
    }.items():
        (root / name).write_text(text)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (root / "cut" / name).write_bytes((root / "dense" / name).read_bytes()[: 10**9 if "config" in name else 1000])
    return root


@pytest.fixture
def refused(place, capsys, monkeypatch):
    """Runs a command that is refused, and returns the message."""
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))

    def run(line):
        argv = line.split()
        assert main(argv) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"clipup {argv[0]}: ") and sorted(place.rglob("*")) == before
        return error.removeprefix(f"clipup {argv[0]}: ")

    return run


TRAIN = "train --model dense --train-data x.csv"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("export ViT-B-32 programs", "pretrained"),
        ("demo --start clipup-tiny-32 --out demonstration", "start: there is no directory clipup-tiny-32"),
        *(
            (line, "'ViT-B-61' is neither an open_clip model")
            for line in (
                *(
                    "eval ViT-B-61 --val-data x.csv",
                    "upcycle ViT-B-61 out",
                    "train --model ViT-B-61 --train-data x.csv",
                ),
                *("index jpegs out --model ViT-B-61", "flops ViT-B-61", "plan --model ViT-B-61 --gpus 8 --batch 8"),
                f"{TRAIN} --distill-model ViT-B-61",
            )
        ),
        ("train", "--model is missing"),
        ("train --model dense", "--train-data is missing"),
        (
            "train --model dense --train-data x.csv --val-data nowhere.csv --batch-size 1",
            "--val-data: there is no file",
        ),
        (f"{TRAIN} --batch-size 1 --accum-freq 99", "--accum-freq (99)"),
        ("train --model sparse --train-data x.csv --capacity-factor 2", "change moe_cfg in its open_clip_config.json"),
        ("train --model dense --train-data jpegs", "--train-data: jpegs is a directory: name shards"),
        ("train --model dense --train-data x.csv --logs x.csv", "--logs: PLACE/x.csv is a file"),
        ("train --model dense --train-data x.csv --device gpu", "--device is 'gpu'"),
        ("upcycle short out --reinit-ratio 0.5 --calibrate-data x.csv --calibrate-batch-size 1", "token id 49407"),
        ("eval short --val-data x.csv", "token id 49407"),
        ("inspect short_sparse --captions classes.txt", "token id 49407"),
        ("upcycle dense out --top-k 9", "--top-k (9) is larger than --num-experts (8)"),
        ("train --num-experts 0", "--num-experts must be a positive int"),
        ("upcycle dense out --blocks 7", "blocks names [7]"),
        ("upcycle dense out --pretrained openai", "--pretrained='openai' cannot be used with the directory"),
        ("upcycle ViT-B-32 out --pretrained jpegs", "--pretrained: no open_clip_config.json in jpegs"),
        ("upcycle ViT-B-32 out --pretrained dense", "--pretrained='dense' holds another architecture than 'ViT-B-32'"),
        ("eval ViT-B-32 --val-data x.csv --pretrained dense", "holds another architecture than 'ViT-B-32'"),
        (f"{TRAIN} --distill-model dense --distill-pretrained openai", "--distill-pretrained='openai' cannot be used"),
        (f"{TRAIN} --distill-model ViT-B-32 --distill-pretrained no", "--distill-pretrained='no' is neither a file"),
        ("upcycle transformers out", "AutoModel.from_pretrained('transformers')"),
        ("index jpegs out --model transformers", "AutoModel.from_pretrained('transformers')"),
        ("eval transformers --val-data x.csv", "AutoModel.from_pretrained('transformers')"),
        ("upcycle dense jpegs", "jpegs is not empty; choose another directory"),
        ("doctor", "pass a MODEL"),
        ("doctor ViT-B-32 --device cpu", "pass a MODEL"),
        ("index nowhere out --model dense", "images: there is no directory"),
        ("index jpegs out --model ViT-B-32", "pretrained"),
        ("search empty cat", "empty is neither an index"),
        ("inspect dense --images jpegs", "has no sparse layers"),
        ("inspect none --images jpegs", "none"),
        ("inspect empty --images jpegs", "holds neither a model"),
        ("inspect sparse --images none", "images: there is no directory none"),
        ("inspect sparse --images empty", "holds no image"),
        ("inspect sparse --images torn", "broken.png"),
        ("inspect sparse --captions blank.txt", "blank.txt is empty"),
        ("inspect sparse", "images and captions are both empty"),
        ("inspect sparse --images jpegs --dense-pretrained x", "--dense-pretrained has no effect"),
        ("inspect sparse --images jpegs --max-images 0", "--max-images must be at least 1"),
        ("inspect sparse --images jpegs --shown -1", "shown must be at least 0"),
        ("upcycle dense x.csv/out", "out: PLACE/x.csv is a file"),
        ("upcycle dense out --reinit-ratio 0.5 --calibrate-data no.csv", "--calibrate-data: there is no file no.csv"),
        ("eval ViT-B-32 --val-data x.csv", "--random-weights"),
        ("eval dense --val-data x.csv --out jpegs", "out: jpegs is a directory"),
        ("eval dense --val-data x.csv --csv-caption-key text", "--csv-caption-key: x.csv has no column 'text'"),
        ("eval dense --dataset csv", "--root"),
        ("eval dense --classes classes.txt", "--images"),
        ("eval dense --dataset csv --root x.csv --val-data x.csv", "--val-data has no effect with --dataset"),
        ("eval half_cfg --val-data x.csv", "half_cfg/open_clip_config.json: model_cfg lacks"),
        ("eval cut --val-data x.csv", "cut/open_clip_model.safetensors is not a complete safetensors file"),
        ("inspect sparse --images jpegs --dense ViT-B-32", "--dense-pretrained"),
        ("convert jpegs out", "jpegs is a directory without weights"),
        ("data pictogram", "did you mean 'pictograms'?"),
        ("eval dense --batch-size 0 --val-data x.csv", "--batch-size must be at least 1"),
    ],
)
def test_user_error_is_one_line_that_names_what_to_change(refused, place, line, named):
    assert named.replace("PLACE", str(place)) in refused(line)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        (f"{TRAIN} --num-experts 8", "--num-experts"),
        (f"{TRAIN} --top_k=1 --no-priority", "--top_k, --no-priority"),
        (f"{TRAIN} --moe --selection-bias-rate 0.1", "--selection-bias-rate"),
        (f"{TRAIN} --moe --balance-weight 0 --balance top2", "--balance"),
        (f"{TRAIN} --moe --entropy-threshold 1", "--entropy-threshold"),
        (f"{TRAIN} --moe --capacity-factor None --priority", "--priority"),
        (f"{TRAIN} --moe --towers image --no-padding-aware", "--no-padding-aware"),
        (f"{TRAIN} --dataset-resampled", "--dataset-resampled"),
        (f"{TRAIN} --val-frequency 2", "--val-frequency"),
        (f"{TRAIN} --skip-scheduler --warmup 5", "--warmup"),
        (f"{TRAIN} --lr-cooldown-end 0.1", "--lr-cooldown-end"),
        (f"{TRAIN} --distill-model dense --loss-chunk-size 2", "--loss-chunk-size"),
        (f"{TRAIN} --siglip --no-local-loss", "--no-local-loss"),
        (f"{TRAIN} --resume latest --name a --force", "--force"),
        (f"{TRAIN} --fsdp-replicas 2", "--fsdp-replicas"),
        (f"{TRAIN} --torchcompile-mode default", "--torchcompile-mode"),
        (f"{TRAIN} --epochs-cooldown 2", "--epochs-cooldown"),
        (f"{TRAIN} --momentum 0.9", "--momentum"),
        (f"{TRAIN} --opt nadamw --fused True", "--fused"),
        (f"{TRAIN} --distill-pretrained openai", "--distill-pretrained"),
        (f"{TRAIN} --save-frequency 0 --delete-previous-checkpoint", "--delete-previous-checkpoint"),
        (f"{TRAIN} --fsdp-checkpoint sharded --no-save-most-recent", "--no-save-most-recent"),
        (f"{TRAIN} --batch-size 1 --coca-caption-loss-weight 3", "--coca-caption-loss-weight"),
        ("train --model dense --train-data a.tar --csv-separator ,", "--csv-separator"),
        ("upcycle short out --calibrate-steps 3", "--calibrate-steps"),
        ("upcycle short out --random-weights", "--random-weights"),
        ("upcycle short out --selection-bias-rate 0.1", "--selection-bias-rate"),
        ("eval dense --val-data x.csv --split val", "--split"),
        ("eval dense --val-data x.csv --annotations a", "--annotations"),
        ("eval dense --val-data x.csv --captions-per-image 1", "--captions-per-image"),
        ("eval dense --val-data x.csv --templates t.txt", "--templates"),
        ("eval dense --classes c --images i --multi-positive", "--multi-positive"),
        ("eval dense --classes c --images i --dataset-type csv", "--dataset-type"),
        ("eval dense --dataset csv --root x.csv --annotations a", "--annotations"),
        ("eval dense --val-data a.tar --csv-img-key i", "--csv-img-key"),
        ("flops dense --json --num-experts 4", "--num-experts"),
        ("flops sparse --num-experts 4", "--num-experts"),
        ("doctor sparse --top-k 1", "--top-k"),
        ("flops dense --moe", "--moe"),
    ],
)
def test_flag_without_effect_is_refused(refused, line, flags):
    assert re.match(f"{flags} ha(s|ve) no effect ", refused(line))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr("clipup.cli.flops.main", Mock(side_effect=error))
    assert main(["flops", "dense"]) == 2
    assert capsys.readouterr().err == f"clipup flops: out of memory: {error}".rstrip() + "\n"


def test_other_runtime_errors_are_raised(monkeypatch):
    monkeypatch.setattr("clipup.cli.flops.main", Mock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        main(["flops", "dense"])


def test_random_weights_flag_upcycles_random_weights(tmp_path, capsys):
    assert main(["upcycle", "clipup-tiny-32", str(tmp_path / "out"), "--random-weights"]) == 0
    assert f"saved to {tmp_path / 'out'} (random weights)" in capsys.readouterr().out


def test_version_flag_prints_the_package_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clipup {clipup.__version__}\n"


@pytest.mark.parametrize(
    ("flag", "meant"), [("train --modle ViT-B-32", "--model"), ("eval d --val-dat x", "--val-data")]
)
def test_misspelled_flag_is_refused_with_the_closest_one(flag, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flag.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and meant in error.split("meant")[1]


PYTHON = shlex.quote(sys.executable)


def shell(command):
    """Runs a command whose output is buffered, as is usual."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("arguments", ["--help", "train --help"])
def test_closed_pipe_is_not_an_error(arguments):
    done = shell(f"{PYTHON} -m clipup {arguments} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stderr == "" and int(done.stdout) in (0, 141)  # 0 if all was written before the pipe was closed


@linux_only
@pytest.mark.parametrize("arguments", ["--help", "flops --help"])
def test_output_that_cannot_be_written_is_told(arguments):
    done = shell(f"{PYTHON} -m clipup {arguments} > /dev/full")
    assert done.returncode == 2 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1
