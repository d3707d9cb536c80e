import json

import pytest
from html_page import assert_stands_alone

from clipup.cli import main
from clipup.demo.pictograms.build import build


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "data"
    build(directory, only=lambda concept: int(concept.key.encode().hex(), 16) % 7 == 0, progress=False)
    return directory


@pytest.fixture(scope="module")
def demonstration(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--out", str(out), "--data", str(data), "--dense-steps", "6", "--continue-steps", "4"]
    arguments += ["--batch-size", "32", "--eval-every", "3"]
    assert main(arguments) == 0
    return out, arguments


def test_the_report_holds_what_is_promised(demonstration):
    out, _ = demonstration
    report = json.loads((out / "report.json").read_text())
    assert set(report["data"]) == {"name", "train_pairs", "test_images", "test_captions"}
    for arm in ("dense", "upcycled_step0", "dense_continued", "clip_up"):
        entry = report[arm]
        for numbers in (entry, *entry["splits"].values()):
            for way in ("text_to_image", "image_to_text"):
                assert 0 <= numbers[f"{way}_R@1"] <= numbers[f"{way}_R@5"] <= numbers[f"{way}_R@10"] <= 1
        assert set(entry["splits"]) == {"emoji", "icons", "concepts"}
        assert all(split["chance_R@1"] == 1 / split["gallery"] for split in entry["splits"].values())
        assert entry["gflops_per_pair"] > 0
    assert report["chance_R@1"] == 1 / report["data"]["test_images"]
    assert report["dense_continued"]["steps"] == report["clip_up"]["steps"] == 4
    assert_stands_alone((out / "report.html").read_text())


def test_the_sparse_model_starts_where_the_dense_one_ended(demonstration):
    report = json.loads((demonstration[0] / "report.json").read_text())
    assert report["upcycled_step0"]["max_feature_difference"] <= 1e-4
    before, after = (report[arm]["text_to_image_R@10"] for arm in ("dense", "upcycled_step0"))
    assert after == pytest.approx(before, abs=1e-3)
    assert report["clip_up"]["params"] > report["clip_up"]["active_params"] > report["dense"]["params"]


@pytest.mark.slow
def test_an_earlier_demonstration_is_not_overwritten_unasked(demonstration, capsys):
    out, arguments = demonstration
    before = (out / "report.json").read_bytes()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0
