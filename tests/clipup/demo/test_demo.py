import json

import pytest
from html_page import Page, assert_stands_alone
from huggingface_hub import ModelCard

import clipup
from clipup.cli import main
from clipup.demo import comparison_tables
from clipup.demo.options import START
from clipup.demo.pictograms.build import build
from clipup.demo.verdict import verdict
from clipup.models import tokenizers
from clipup.models.model_directory import WEIGHTS_NAME


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "data"
    build(directory, only=lambda concept: int(concept.key.encode().hex(), 16) % 7 == 0, progress=False)
    return directory


@pytest.fixture(scope="module")
def demonstration(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--out", str(out), "--data", str(data), "--continue-steps", "4"]
    arguments += ["--batch-size", "32", "--eval-every", "3"]
    assert main(arguments) == 0
    return out, arguments


def test_the_report_has_the_recalls_costs_and_differences_of_every_model(demonstration):
    out, _ = demonstration
    report = json.loads((out / "report.json").read_text())
    assert set(report["data"]) == {"name", "train_pairs", "test_images", "test_captions"}
    arms = [report[arm] for arm in ("dense", "upcycled_step0", "dense_continued", "clip_up")]
    for numbers in (part for arm in arms for part in (arm, *arm["splits"].values())):
        for way in ("text_to_image", "image_to_text"):
            assert 0 <= numbers[f"{way}_R@1"] <= numbers[f"{way}_R@5"] <= numbers[f"{way}_R@10"] <= 1
        assert numbers["chance_R@1"] == 1 / numbers["gallery"]
    assert all(set(arm["splits"]) == {"emoji", "icons", "concepts"} and arm["gflops_per_pair"] > 0 for arm in arms)
    assert report["chance_R@1"] == 1 / report["data"]["test_images"]
    assert [arm["steps"] for arm in arms] == [0, 0, 4, 4]
    assert report["upcycled_step0"]["max_feature_difference"] <= 1e-4
    assert arms[1]["text_to_image_R@10"] == pytest.approx(arms[0]["text_to_image_R@10"], abs=1e-3)
    assert arms[3]["params"] > arms[3]["active_params"] > arms[0]["params"] == arms[2]["params"]
    html = (out / "report.html").read_text()
    assert_stands_alone(html)
    page = Page(html)
    shown = [make(report) for make in (comparison_tables.overview, comparison_tables.splits)]
    assert {cell for table in shown for one in table.columns for cell in one.cells} - {""} <= set(page.words)
    assert verdict(report).sentence.replace("\u00a0", " ") in page.text.replace("\u00a0", " ")


def test_the_model_that_it_starts_from_is_small_and_dense_and_loads(caplog):
    assert ModelCard.load(START / "README.md").data.library_name == "clipup" and not caplog.records
    assert (START / WEIGHTS_NAME).stat().st_size < 4e6
    model, *_ = clipup.create_model_and_transforms(str(START))
    assert not clipup.moe_layers(model) and all(p.isfinite().all() for p in model.parameters())
    assert tokenizers.get_tokenizer(str(START))("arrow left").shape == (1, 12)


@pytest.mark.slow
def test_an_earlier_demonstration_is_not_overwritten_unasked(demonstration, capsys):
    out, arguments = demonstration
    before = (out / "report.json").read_bytes()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0
