"""``clipup eval`` from the outside."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import clipup
from clipup.cli import main


@pytest.fixture
def directory(model, tmp_path):
    from .conftest import MODEL_CFG

    clipup.save_pretrained(model, tmp_path / "model", MODEL_CFG)
    return tmp_path / "model"


@pytest.fixture
def val_data(tmp_path):
    """Four pictures, the first with two captions, and one row whose picture is broken."""
    rows = ["filepath\ttitle"]
    for index in range(4):
        Image.new("RGB", (20, 20), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append(f"{tmp_path / f'{index}.png'}\tred number {index}")
    rows.append(f"{tmp_path / '0.png'}\tblack")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.append(f"{tmp_path / 'broken.png'}\tbroken")
    (tmp_path / "val.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "val.csv"


@pytest.fixture
def classes(tmp_path):
    """Class names, and a directory with a picture of each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return ["--classes", str(tmp_path / "classes.txt"), "--images", str(tmp_path / "images")]


def run(directory, *options):
    return main(["eval", str(directory), "--device", "cpu", "--workers", "0", *map(str, options)])


def test_eval_prints_a_table_and_writes_json(directory, val_data, classes, tmp_path, capsys):
    assert run(directory, "--val-data", val_data, *classes, "--json", tmp_path / "out" / "results.json") == 0

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    retrieval = results["retrieval"]
    assert (retrieval["gallery"], retrieval["captions"], retrieval["skipped"]) == (4, 5, 1)
    assert retrieval["t2i"]["r5"] == retrieval["i2t"]["r5"] == 1
    assert (results["zero_shot"]["images"], results["zero_shot"]["classes"]) == (2, 2)
    table = capsys.readouterr().out
    assert "t2i R@1" in table and "zero-shot" in table and "25.00" in table


def test_json_alone_is_printed_on_request(directory, val_data, capsys):
    assert run(directory, "--val-data", val_data, "--json", "-") == 0

    assert json.loads(capsys.readouterr().out)["retrieval"]["gallery"] == 4


def test_half_precision_agrees_with_float32(directory, val_data, capsys):
    gallery = {}
    for precision in ("fp32", "amp_bf16", "bf16"):
        assert run(directory, "--val-data", val_data, "--json", "-", "--precision", precision) == 0
        gallery[precision] = json.loads(capsys.readouterr().out)["retrieval"]["t2i"]["r5"]

    assert gallery == {"fp32": 1, "amp_bf16": 1, "bf16": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--val-data", "nowhere.csv"], "nowhere.csv"),
        (["--val-data", "EMPTY"], "no sample"),
        (["--classes", "nowhere.txt", "--images", "."], "there is no file nowhere.txt"),
    ],
)
def test_bad_input_is_named_on_one_line_with_exit_code_2(directory, tmp_path, capsys, options, message):
    (tmp_path / "empty.csv").write_text("filepath\ttitle\n")
    options = [option.replace("EMPTY", str(tmp_path / "empty.csv")) for option in options]

    assert run(directory, *options) == 2

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("clipup eval: ") and message in error


def test_a_directory_without_a_model_is_named(tmp_path, val_data, capsys):
    (tmp_path / "nothing").mkdir()

    assert run(tmp_path / "nothing", "--val-data", val_data) == 2

    assert "no open_clip_config.json" in capsys.readouterr().err


def test_nothing_to_measure_is_refused(directory, capsys):
    with pytest.raises(SystemExit):
        run(directory)

    assert "nothing to measure" in capsys.readouterr().err
