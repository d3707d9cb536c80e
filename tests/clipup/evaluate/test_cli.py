"""``clipup eval`` from the outside."""

import json

import benchmark_layouts as layouts
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from clipup import create_model_and_transforms
from clipup.cli import main
from clipup.inference.prepared_experts import PreparedMoE
from clipup.moe.layer import SparseMoE


@pytest.fixture
def val_data(tmp_path):
    """Four pictures, the first with two captions."""
    rows = ["filepath\ttitle"]
    for index in range(4):
        Image.new("RGB", (20, 20), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append(f"{tmp_path / f'{index}.png'}\tred number {index}")
    rows.append(f"{tmp_path / '0.png'}\tblack")
    (tmp_path / "val.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "val.csv"


@pytest.fixture
def damaged_data(val_data, tmp_path):
    """The same with one row whose picture is broken."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with open(val_data, "a") as file:
        file.write(f"{tmp_path / 'broken.png'}\tbroken\n")
    return val_data


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


def test_eval_says_which_directory_is_which_class(directory, classes, tmp_path, capsys):
    (tmp_path / "classes.txt").write_bytes("kätze\nhund\n".encode("latin-1"))
    assert run(directory, *classes) == 2 and "classes.txt is not UTF-8" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("\ufeffkatze\nhund\n")  # as Windows' editors save it
    assert run(directory, *classes) == 0
    assert "cat is 'katze', ..., dog is 'hund'" in capsys.readouterr().err


def test_pictures_of_a_class_that_are_not_read_are_counted(directory, classes, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "cat" / "1.tif")
    (tmp_path / "images" / "dog" / "1.CR2").write_text("a raw photograph")
    assert run(directory, *classes) == 0
    assert "passed over pictures of other kinds (1): RAW cr2 (1)" in capsys.readouterr().err


def test_eval_prints_a_table_and_writes_json(directory, damaged_data, classes, tmp_path, capsys):
    out = tmp_path / "out" / "results.json"
    assert (
        run(directory, "--val-data", damaged_data, "--max-skipped", 0.2, *classes, "--by", "sorce", "--json", out) == 0
    )

    results = json.loads(out.read_text())
    assert (results["val_data"], results["classes"]) == (str(damaged_data), classes[1])
    retrieval = results["retrieval"]
    assert (retrieval["gallery"], retrieval["captions"], retrieval["skipped"]) == (4, 5, 1)
    assert retrieval["text_to_image_R@5"] == retrieval["image_to_text_R@5"] == 1
    assert (results["zero_shot"]["images"], results["zero_shot"]["classes"]) == (2, 2)
    table, errors = capsys.readouterr()
    assert "skipped 1 unreadable, such as " in errors and "no image has the metadata key of --by, 'sorce'" in errors
    assert "retrieval (%)" in table and "text_to_image" in table and "zero-shot" in table and "25.00" in table


def test_a_run_stands_for_its_model(directory, val_data, tmp_path, capsys):
    """That of a finished run; of another one the newest checkpoint, as of ``clipup inspect``."""
    (tmp_path / "finished").mkdir()
    finished = directory.rename(tmp_path / "finished" / "model")

    assert run(finished.parent, "--val-data", val_data, "--card") == 0

    assert "text_to_image_R@1" in (finished / "README.md").read_text()


def test_results_say_which_weights_were_measured(val_data, tmp_path, capsys):
    weights = tmp_path / "weights.pt"
    torch.save(create_model_and_transforms("clipup-tiny-32", load_weights=False)[0].state_dict(), weights)
    given = results("clipup-tiny-32", capsys, "--val-data", val_data, "--pretrained", weights)
    drawn = results("clipup-tiny-32", capsys, "--val-data", val_data, "--random-weights")
    assert given["pretrained"] == str(weights) and "random_weights" not in given
    assert drawn["random_weights"] is True and "pretrained" not in drawn


def results(directory, capsys, *options):
    assert run(directory, *options, "--out", "-") == 0
    return json.loads(capsys.readouterr().out)


def test_coco_and_flickr30k_are_measured_on_all_captions_or_on_the_first_of_each_image(directory, tmp_path, capsys):
    for name in ("coco", "flickr30k"):
        options = ["--dataset", name, "--root", getattr(layouts, name)(tmp_path / name)]

        every = results(directory, capsys, *options)
        first = results(directory, capsys, *options, "--captions-per-image", 1)

        assert (every["dataset"], every["split"]) == (name, "test")
        assert (every["retrieval"]["gallery"], every["retrieval"]["captions"]) == (12, 60)
        assert (first["retrieval"]["gallery"], first["retrieval"]["captions"]) == (12, 12)


def test_shards_and_csv_files_by_path_are_measured_too(directory, tmp_path, val_data, capsys):
    root = layouts.webdataset(tmp_path / "data", retrieval=True)
    shards = results(directory, capsys, "--dataset", "webdataset", "--root", root / "test" / "{0..1}.tar")
    rows = results(directory, capsys, "--dataset", "csv", "--root", val_data)

    assert shards["retrieval"]["gallery"] == 12 and rows["retrieval"]["gallery"] == 4
    assert rows["root"] == str(val_data) and "split" not in {**shards, **rows}


def test_results_are_added_to_the_model_card_on_request(directory, tmp_path, capsys):
    root = layouts.coco(tmp_path / "coco")
    assert run(directory, "--dataset", "coco", "--root", root, "--card") == 0
    printed = capsys.readouterr().out.splitlines()[1].split()

    card = (directory / "README.md").read_text()

    assert f"| coco test: 12 images, 60 captions | text_to_image_R@1 | {printed[3]} |" in card
    (directory / "README.md").unlink()
    assert run(directory, "--dataset", "coco", "--root", root, "--card", "--out", tmp_path / "results.json") == 2
    assert "retrieval" in json.loads((tmp_path / "results.json").read_text())
    capsys.readouterr()
    assert run("ViT-B-32", "--dataset", "coco", "--root", root, "--card") == 2
    assert "card: ViT-B-32 is no model's directory" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "form"), [("fp32", PreparedMoE), ("bf16", PreparedMoE), ("amp_bf16", SparseMoE)])
def test_on_a_cpu_a_prepared_model_is_measured_unless_autocast_casts_its_weights(directory, val_data, precision, form):
    forms = set()

    def note(module, args):
        if isinstance(module, SparseMoE):
            forms.add(type(module))

    with register_module_forward_pre_hook(note):
        assert run(directory, "--val-data", val_data, "--precision", precision) == 0
    assert forms == {form}


def test_int8_is_measured_and_named(directory, val_data, capsys):
    forms = []

    def note(module, args):
        if isinstance(module, PreparedMoE):
            forms[-1].add(module.quantize)

    def of(*flags):
        forms.append(set())
        return results(directory, capsys, "--val-data", val_data, *flags)

    with register_module_forward_pre_hook(note):
        plain, int8 = of(), of("--int8")
    assert forms == [{None}, {"int8"}]
    assert int8["precision"] == "fp32, int8 weights" and plain["precision"] == "fp32"
    assert int8["retrieval"]["captions"] == plain["retrieval"]["captions"]


def test_equal_captions_count_as_one_text_if_asked(directory, val_data, capsys):
    val_data.write_text(val_data.read_text().replace("red number 1", "black"))
    plain, merged = (results(directory, capsys, "--val-data", val_data, *flags) for flags in ([], ["--multi-positive"]))
    assert (plain["retrieval"]["captions"], merged["retrieval"]["captions"]) == (5, 4)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--val-data", "nowhere.csv"], "nowhere.csv"),
        (["--val-data", "BROKEN"], "--max-skipped"),
        (["--classes", "nowhere.txt", "--images", "."], "nowhere.txt"),
        ([], "nothing to measure"),
        (["--dataset", "coco", "--root", "nowhere"], "nowhere"),
        (["--dataset", "webdataset", "--root", "nowhere", "--split", "val"], "--root"),
        (["--dataset", "csv", "--root", "BROKEN", "--split", "train"], "--split"),
        (["--dataset", "csv", "--root", "BROKEN"], "broken.png"),
        (["--dataset", "coco", "--root", ".", "--captions-per-image", "0"], "--captions-per-image"),
        (["--val-data", "a.csv", "--captions-per-image", "5"], "--captions-per-image"),
        (["--dataset", "coco", "--root", ".", "--max-image-pixels", "0"], "--max-image-pixels"),
        (["--val-data", "BROKEN", "--int8", "--precision", "amp_bf16"], "int8"),
    ],
)
def test_mistakes_are_named_on_one_line_with_exit_code_2(directory, damaged_data, capsys, flags, named):
    assert run(directory, *(flag.replace("BROKEN", str(damaged_data)) for flag in flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("clipup eval: ") and named in error
