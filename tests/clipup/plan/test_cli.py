import json
import re

import pytest

from clipup.cli import main

RUN = ["plan", "--model", "clipup-tiny-32", "--gpus", "8", "--batch", "1024"]


def planned(capsys, *arguments):
    assert main([*RUN, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_says_what_fits_how_sure_it_is_and_what_to_use_instead(capsys):
    run = ["--samples", "1000000", "--price", "2"]
    assert main([*RUN, "--moe", "--fsdp", "--ep", "2", *run]) == 0
    out = capsys.readouterr().out
    assert "fits into 80 GB" in out and "expert rows" in out and "what autograd saves" in out
    assert "run of 1,000,000 pairs, 977 steps" in out and "\n  --batch-size 128" in out
    assert "of 989 TFLOP/s" in out
    assert main([*RUN, "--precision", "fp32"]) == 0 and "of 67 TFLOP/s" in capsys.readouterr().out


def test_hours_and_price_follow_from_the_measured_pace(capsys):
    pace = ["--images-per-second", "100", "--price", "3", "--gpus", "1"]
    made = planned(capsys, *pace, "--epochs", "2", "--train-num-samples", "180000")["plan"]
    run = made["run"]
    assert made["memory"]["available_bytes"] == 80e9
    assert (run["samples"], run["steps"]) == (358_400, 350)  # 800 pairs of an epoch fill no step
    assert run["gpu_hours"] == pytest.approx(1, rel=0.01) and run["price"] == 3 * run["gpu_hours"]


def test_logits_of_a_sigmoid_loss_take_less_memory_in_chunks(capsys):
    def logits(*chunk):
        parts = planned(capsys, "--siglip", *chunk)["plan"]["memory"]["parts"]
        return next(part["bytes"] for part in parts if part["name"] == "working memory of the loss")

    assert logits("--loss-chunk-size", "16") == logits() / 8  # of a rank's 128 images


@pytest.mark.slow
def test_a_gpu_with_too_little_memory_gets_another_setting(capsys):
    large = planned(capsys, "--moe")["plan"]
    assert large["fits"]
    small = str(0.5 * large["memory"]["needed_bytes"] / 1e9)
    both = planned(capsys, "--moe", "--memory-gb", small)
    assert not both["plan"]["fits"] and both["proposed"]["fits"]
    assert both["proposed"]["setting"]["grad_checkpointing"] or both["proposed"]["setting"]["accum_freq"] > 1
    assert planned(capsys, "--moe", "--memory-gb", "0.001")["proposed"] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "1000", "--accum-freq", "2"], r"--batch must be a multiple of gpus \* --accum-freq = 8 \* 2"),
        (["--ep", "2"], "set moe"),
        (["--moe", "--ep", "3"], "--ep 3|ep 3"),
        (["--fsdp", "--precision", "amp"], "precision"),
        (["--gpu", "h1000"], "gpu"),
        (["--model", "coca_ViT-B-32"], "CoCa"),
        (["--model", "RN50"], "the image tower has no transformer blocks"),
        (["--price", "2"], "--price"),
        (["--num-experts", "4"], "--num-experts has no effect without --moe"),
        (["--moe", "--ep", "2", "--fsdp", "--caption-tokens", "100"], "--caption-tokens must be 1 to 12"),
        (["--epochs", "2"], "--train-num-samples"),
        (["--gpus", "0"], "gpus must be"),
        (["--images-per-second", "0"], "images_per_second|images-per-second"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--mfu", "1.5"], "mfu must be above 0 and at most 1"),
        (["--tflops", "inf"], "tflops must be positive"),
        (["--reserve", "1e400"], "reserve must be 0 or more"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments, named, capsys):
    assert main([*RUN, *arguments]) == 2
    assert re.search(named, capsys.readouterr().err)
