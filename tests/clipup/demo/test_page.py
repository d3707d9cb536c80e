import re

import numpy as np
import pytest
from html_page import Page, assert_stands_alone
from PIL import Image

from clipup.demo import comparison_tables
from clipup.demo.page import _loss, render_demo
from clipup.inspection.page import layer_title

EVIL = "<script>alert('caption')</script>\"><img src=x onerror=alert(1)> \ud83d \x00"


def test_the_page_has_every_number_and_stands_alone(inputs):
    html = render_demo(**inputs)
    page = Page(html)
    assert html.startswith("<!doctype html>") and html.count("upcycled</text>") == 3 and ">15%</text>" in html
    assert_stands_alone(html)
    for make in (comparison_tables.quality, comparison_tables.cost, comparison_tables.splits):
        for cell in (cell for one in make(inputs["report"]).columns for cell in one.cells):
            assert cell in page.words or cell == ""
    first_screen = page.text.split(" Training ")[0]
    assert "gallery of 1,012 images and 3,988 captions, chance R@1 0.099 %" in first_screen
    assert "at most 3.0e-07 before the first step" in first_screen
    assert "Abacus-7" in page.text and "blocks.image 1, 3" in page.text


def test_captions_and_names_may_hold_anything(make):
    inputs = make.inputs(make.report(0.15, 0.15))
    inputs["report"]["data"]["name"] = EVIL
    for example in [*inputs["routing"], *inputs["retrievals"]["best"], *inputs["retrievals"]["worst"]]:
        example["caption"] = EVIL
    inputs["data_notes"]["licences"][0]["name"] = EVIL
    html = render_demo(**inputs)
    page = Page(html)
    assert not [tag for tag, attributes in page.elements if tag == "script" or "onerror" in attributes]
    assert page.text.count("<script>alert('caption')</script>") == 5
    html.encode("utf-8")
    assert re.search(r'<p class="statement" id="verdict">[^<]*CLIP-UP is behind the dense baseline', html)


def test_the_contrastive_loss_is_drawn_and_not_the_sum_with_the_auxiliary_losses(inputs):
    records = inputs["curves"]["clip_up"]
    line = _loss("clip_up", records, 1)
    assert (line.x[0], line.y[0]) == (601, records[0]["contrastive"]) and len(line.x) == 300


def test_a_model_that_came_trained_has_no_curve_of_its_training(inputs):
    inputs["report"]["dense"]["steps"] = 0
    for records in (inputs["curves"], inputs["evaluations"]):
        del records["dense"]
    page = render_demo(**inputs)
    assert "upcycled</text>" not in page and "A dense CLIP trained on other images" in page


def test_a_page_stays_under_3_mb(make):
    inputs = make.inputs(make.report(), experts=16)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 480, 3), dtype=np.uint8))
    found = {"caption": "x" * 100_000, "target": photo, "rank": 2, "retrieved": [photo] * 5}
    inputs["retrievals"] = {"best": [found] * 4, "worst": [found] * 4}
    layers = {f"visual.transformer.resblocks.{i}.mlp": np.zeros((14, 14), dtype=int) for i in range(1, 4, 2)}
    inputs["routing"] = [{"image": photo, "caption": "x" * 100_000, "layers": layers}] * 8
    inputs["loads"] = {f"transformer.resblocks.{i}.mlp": next(iter(inputs["loads"].values())) for i in range(6)}
    inputs["curves"] = {arm: records * 20 for arm, records in inputs["curves"].items()}
    assert len(render_demo(**inputs).encode()) < 3_000_000


@pytest.mark.parametrize(
    "name, title",
    [
        ("visual.transformer.resblocks.3.mlp", "Image tower, block 3"),
        ("transformer.resblocks.11.mlp", "Text tower, block 11"),
        ("visual.trunk.stages.2.blocks.5.mlp", "Image tower, block 2.5"),
        ("something.else", "something.else"),
    ],
)
def test_layers_have_names_for_readers(name, title):
    assert layer_title(name) == title
