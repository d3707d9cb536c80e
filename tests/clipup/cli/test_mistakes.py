"""User errors on the command line: each prints one line that says what to change, with exit code 2."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from PIL import Image
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, save_pretrained, upcycle
from clipup.cli import COMMANDS, main
from clipup.train import TrainOptions, train

ROOT = Path(__file__).parents[3]


TOO_FEW_TOKENS = "the tokenizer gives token id 49407, but the model's token embedding [64, 32] has ids up to 63"


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
    for directory in ("jpegs", "pairs", "tables", "shards", "empty", "no_cfg", "half_cfg", "cut"):
        (root / directory).mkdir()
    for name in ("jpegs/cat.jpg", "pairs/cat.jpg"):
        Image.new("RGB", (8, 8)).save(root / name)
    (root / "pairs" / "cat.txt").write_text("a cat")
    (root / "x.csv").write_text(f"filepath\ttitle\n{root / 'jpegs/cat.jpg'}\ta cat\n")
    (root / "tables" / "x.csv").write_text("filepath\ttitle\n")
    (root / "shards" / "0.tar").write_bytes(b"")
    (root / "classes.txt").write_text("cat\n")
    (root / "no_cfg" / "open_clip_config.json").write_text('{"model_cfg": 3}')
    (root / "half_cfg" / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}}')
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "export ViT-B-32 programs",
            "pretrained is missing, so ViT-B-32 would have random weights; pass a file of weights",
        ),
        ("train", "--model is missing: pass a name that open_clip knows, such as --model ViT-B-16"),
        ("train --train-data x.csv --pretrained weights.pt", "--model is missing"),
        ("train --model dense", "--train-data is missing: pass --train-data with a CSV file or WebDataset shards"),
        (
            "train --model dense --train-data x.csv --val-data nowhere.csv --batch-size 1",
            "--val-data: there is no file",
        ),
        ("train --model dense --train-data x.csv --logs x.csv", "--logs: PLACE/x.csv is a file; expected a directory"),
        ("train --model dense --train-data x.csv --logs None", "--logs: got None, with which nothing is saved"),
        (
            "train --model dense --train-data x.csv --device gpu",
            "--device is 'gpu', expected auto, cpu, cuda or cuda:N",
        ),
        (
            "upcycle ViT-B-32 out",
            "pretrained is missing, so ViT-B-32 would have random weights; pass a file of weights",
        ),
        ("train --model short --train-data x.csv --batch-size 1", TOO_FEW_TOKENS),
        ("upcycle short out --reinit-ratio 0.5 --calibrate-data x.csv --calibrate-batch-size 1", TOO_FEW_TOKENS),
        ("eval short --val-data x.csv", TOO_FEW_TOKENS),
        ("inspect short_sparse --captions classes.txt", TOO_FEW_TOKENS),
        ("upcycle dense x.csv/out", "out: PLACE/x.csv is a file; expected a directory"),
        ("eval ViT-B-32 --val-data x.csv", "or --random-weights to measure random weights"),
        ("eval ViT-B-32 --pretrained openai --val-data nowhere.csv", "--val-data: there is no file nowhere.csv"),
        ("eval dense --val-data x.csv --out jpegs", "out: jpegs is a directory; expected the path of a file"),
        ("eval dense --val-data x.csv --device gpu", "--device is 'gpu', expected auto, cpu, cuda or cuda:N"),
        ("eval dense --val-data val_data.csv", "--val-data: there is no file val_data.csv"),
        (
            "eval dense --val-data x.csv --csv-caption-key text",
            "--csv-caption-key: x.csv has no column 'text', its columns are ['filepath', 'title']: correct "
            "--csv-caption-key, or --csv-separator (now",
        ),
        ("upcycle dense out --reinit-ratio 0.5 --calibrate-data no.csv", "--calibrate-data: there is no file no.csv"),
        ("eval half_cfg --val-data x.csv", "half_cfg/open_clip_config.json: model_cfg lacks vision_cfg, text_cfg"),
        ("eval cut --val-data x.csv", "cut/open_clip_model.safetensors is not a complete safetensors file: "),
        ("inspect sparse --captions jpegs", "there is no file jpegs"),
        ("inspect sparse --images jpegs --out jpegs", "out: jpegs is a directory; expected the path of a file"),
        ("inspect sparse --images jpegs --dense ViT-B-32", "--dense-pretrained is missing, so ViT-B-32 would have"),
        ("doctor half_cfg", "lacks vision_cfg, text_cfg"),
        ("data pictogram", "there is no data set 'pictogram'; did you mean 'pictograms'?"),
    ],
)
def test_user_error_is_one_line_that_says_what_to_change(refused, place, line, message):
    assert message.replace("PLACE", str(place)) in refused(line)


@pytest.mark.parametrize(
    ("directory", "advice"),
    [
        (
            "jpegs",
            "it holds images, such as cat.jpg, and no captions: write a CSV file with the columns filepath and title",
        ),
        ("pairs", "tar --sort=name --dereference --hard-dereference -cf data.tar -C pairs . and name data.tar"),
        ("tables", "name its shards or a CSV file, such as tables/x.csv"),
        ("shards", "name its shards or a CSV file, such as shards/"),
        ("empty", "it holds no shard (.tar), no CSV file and no image"),
    ],
)
def test_directory_as_data_is_refused_with_the_file_to_pass(refused, directory, advice):
    assert f"--train-data: {directory} is a directory: " in (
        error := refused(f"train --model dense --train-data {directory}")
    )
    assert advice in error
    assert advice in refused(f"eval dense --val-data {directory}")


TRAIN = "train --model dense --train-data x.csv"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{TRAIN} --num-experts 8", "--num-experts has no effect without --moe"),
        (f"{TRAIN} --top_k=1 --no-priority", "--top_k, --no-priority have no effect without --moe"),
        (f"{TRAIN} --moe --selection-bias-rate 0.1", "--selection-bias-rate has no effect without --selection-bias"),
        (f"{TRAIN} --moe --balance-weight 0 --balance top2", "--balance has no effect with --balance-weight 0"),
        (f"{TRAIN} --moe --entropy-threshold 1", "--entropy-threshold has no effect without --global-entropy-weight"),
        (f"{TRAIN} --moe --capacity-factor None --priority", "--priority has no effect without --capacity-factor"),
        (f"{TRAIN} --moe --towers image --no-padding-aware", "--no-padding-aware has no effect without the text tower"),
        (f"{TRAIN} --train-num-samples 9", "--train-num-samples has no effect on a CSV file"),
        (f"{TRAIN} --dataset-resampled", "--dataset-resampled has no effect on a CSV file"),
        (f"{TRAIN} --val-frequency 2", "--val-frequency has no effect without --val-data"),
        (f"{TRAIN} --skip-scheduler --warmup 5", "--warmup has no effect with --skip-scheduler"),
        (f"{TRAIN} --lr-cooldown-end 0.1", "--lr-cooldown-end has no effect without --lr-scheduler const-cooldown"),
        (f"{TRAIN} --distill-model dense --loss-chunk-size 2", "--loss-chunk-size has no effect with --distill-model"),
        (f"{TRAIN} --siglip --no-local-loss", "--no-local-loss has no effect with --siglip"),
        (f"{TRAIN} --resume latest --name a --force", "--force has no effect with --resume"),
        (f"{TRAIN} --save-frequency 0 --delete-previous-checkpoint", "has no effect with --save-frequency 0"),
        (
            f"{TRAIN} --batch-size 1 --coca-caption-loss-weight 3",
            "--coca-caption-loss-weight has no effect on a model without a decoder",
        ),
        (
            "train --model dense --train-data a.tar --csv-separator ,",
            "--csv-separator has no effect without a CSV file",
        ),
        ("upcycle short out --calibrate-steps 3", "--calibrate-steps has no effect without --calibrate-data"),
        ("upcycle short out --allow-pipe", "--allow-pipe has no effect without --calibrate-data"),
        ("upcycle short out --random-weights", "--random-weights has no effect on a model that has its own weights"),
        ("upcycle short out --selection-bias-rate 0.1", "--selection-bias-rate has no effect without --selection-bias"),
        ("eval dense --val-data x.csv --split val", "--split has no effect without --dataset"),
        ("eval dense --val-data x.csv --templates t.txt", "--templates has no effect without classes"),
        (
            "eval dense --classes c --images i --multi-positive",
            "--multi-positive has no effect without data for retrieval",
        ),
        ("eval dense --classes c --images i --dataset-type csv", "--dataset-type has no effect without --val-data"),
        ("eval dense --dataset csv --root x.csv --annotations a", "--annotations has no effect on another --dataset"),
        ("eval dense --val-data a.tar --csv-img-key i", "--csv-img-key has no effect without a CSV file"),
        ("flops dense --json --num-experts 4", "--num-experts has no effect on --json without --moe"),
        ("flops sparse --num-experts 4", "--num-experts has no effect on a model that is already sparse"),
        ("doctor sparse --top-k 1", "--top-k has no effect on a model that is already sparse"),
        ("demo --lr 1e-3", "--lr has no effect without --dense-steps"),
    ],
)
def test_flag_without_effect_is_refused(refused, line, message):
    assert message in refused(line)


def test_moe_options_of_a_dense_run_are_refused_in_python(tmp_path):
    options = TrainOptions(moe_cfg=MoEConfig(num_experts=4), steps=1, logs=None, device="cpu")
    with pytest.raises(ValueError, match="moe_cfg has no effect without moe=True"):
        train(options, model=tiny_clip(), loader=[])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_and_other_runtime_errors_are_raised(error, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("clipup.cli.flops.main", fail)
    assert main(["flops", "dense"]) == 2
    assert capsys.readouterr().err == f"clipup flops: out of memory: {error}".rstrip() + "\n"
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        main(["flops", "dense"])


def test_random_weights_flag_upcycles_random_weights(tmp_path, capsys):
    assert main(["upcycle", "clipup-tiny-32", str(tmp_path / "out"), "--random-weights"]) == 0
    assert f"saved to {tmp_path / 'out'} (random weights)" in capsys.readouterr().out


def test_version_flag_prints_the_package_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clipup {clipup.__version__}\n"


@pytest.mark.parametrize("command", [*COMMANDS, "data pictograms"])
def test_every_command_has_help(command, capsys):
    try:
        code = main([*command.split(), "--help"])
    except SystemExit as stop:
        code = stop.code
    assert (
        code in (0, None)
        and f"usage: {'clip_benchmark' if command == 'clip-benchmark' else 'clipup'}" in capsys.readouterr().out
    )


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


@pytest.mark.parametrize("arguments", ["--help", "flops --help", "doctor clipup-tiny-32"])
def test_closed_pipe_is_not_an_error(arguments):
    done = shell(f"{PYTHON} -m clipup {arguments} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stderr == "" and int(done.stdout) in (0, 141)  # 0 if all was written before the pipe was closed


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("arguments", ["train --epochs x", "nothing"])
def test_mistakes_are_told_by_the_exit_code_whatever_takes_the_output(arguments, streams):
    done = shell(f"{PYTHON} -m clipup {arguments} {streams}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("arguments", ["--version", "--help", "flops --help"])
def test_output_that_cannot_be_written_is_told(arguments):
    done = shell(f"{PYTHON} -m clipup {arguments} > /dev/full")
    assert done.returncode == 2 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("taker", ["> /dev/full", "| true"])
def test_a_mistake_after_output_that_nothing_takes_is_told(taker):
    program = """
import sys, time
from clipup.cli import reporting_errors

def command():
    print("a table")
    time.sleep(0.5)  # until the reader of a pipe is gone
    raise ValueError("wrong value")

sys.exit(reporting_errors("clipup x", command))
"""
    done = shell(f"{PYTHON} -c {shlex.quote(program)} {taker}; echo ${{PIPESTATUS[0]}}")
    assert (done.stderr, done.stdout) == ("clipup x: wrong value\n", "2\n")


def test_what_is_opened_gets_no_descriptor_of_a_closed_stream(tmp_path):
    program = (
        "import os, sys; from clipup.cli import main; main(['--version']); print(os.open(sys.argv[1], os.O_CREAT))"
    )
    done = shell(f"{PYTHON} -c {shlex.quote(program)} {tmp_path / 'file'} <&- 2>&-")
    assert int(done.stdout.splitlines()[-1]) > 2


def test_programs_that_are_started_get_no_closed_streams_either():
    child = "import os; print(*(os.path.exists(f'/proc/self/fd/{stream}') for stream in range(3)))"
    program = f"""
import subprocess, sys
from clipup.cli import main
main(["--version"])
print(subprocess.run([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True).stdout)
"""
    done = shell(f"{PYTHON} -c {shlex.quote(program)} <&- 2>&-")
    assert done.stdout.split()[-3:] == ["True"] * 3
