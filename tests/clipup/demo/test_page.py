import copy
import re

import numpy as np
import pytest
from html_page import Page, assert_stands_alone
from PIL import Image

from clipup.demo import comparison_tables
from clipup.demo.page import render_demo
from clipup.inspection.page import layer_title

EVIL = "<script>alert('caption')</script>\"><img src=x onerror=alert(1)>"


def with_text_everywhere(inputs, text):
    """The inputs with ``text`` in every place that takes words."""
    changed = copy.deepcopy(inputs)
    changed["report"]["data"]["name"] = text
    changed["report"] |= {"commands": [text], text: text, "machine": {text: {text: [text]}}}
    changed["report"]["clip_up"] |= {text: text}
    changed["report"]["clip_up"]["splits"][text] = {"gallery": 10}
    changed["loads"] = {text: next(iter(inputs["loads"].values()))}
    for example in changed["routing"]:
        example["caption"], example["layers"] = text, {text: [[0, 1], [2, 3]]}
    for found in [*changed["retrievals"]["best"], *changed["retrievals"]["worst"]]:
        found["caption"] = found["model"] = text
    changed["data_notes"] = {
        "splits": {text: {"images": text, "captions": text, "rule": text}},
        "licences": [{"name": text, "licence": text, "artist": text, "url": text}],
        "left_out": text,
    }
    return changed


def test_the_page_is_html_whose_tags_nest(inputs):
    html = render_demo(**inputs)
    assert html.startswith("<!doctype html>")
    assert [tag for tag, _ in Page(html).elements if tag == "h2"]


def test_every_number_of_the_comparison_is_on_the_page(inputs):
    page = Page(render_demo(**inputs))
    for table in (
        comparison_tables.quality(inputs["report"]),
        comparison_tables.cost(inputs["report"]),
        comparison_tables.splits(inputs["report"]),
    ):
        for cell in (cell for one in table.columns for cell in one.cells):
            assert cell in page.words or cell == ""


def test_chance_gallery_and_the_difference_at_step_zero_are_on_the_first_screen(inputs):
    before_training = Page(render_demo(**inputs)).text.split(" Training ")[0]
    assert "gallery of 1,012 images and 3,988 captions, chance R@1 0.099 %" in before_training
    assert "at most 3.0e-07 before the first step" in before_training


@pytest.mark.parametrize("r1, standing", [(0.30, "ahead of"), (0.15, "behind")])
def test_the_verdict_says_it_as_loudly_when_clip_up_is_worse(make, r1, standing):
    html = render_demo(**make.inputs(make.report(r1, r1)))
    assert re.search(rf'<p class="statement" id="verdict">[^<]*CLIP-UP is {standing} the dense baseline', html)


def test_nothing_is_loaded_from_anywhere_and_nothing_runs(inputs):
    assert_stands_alone(render_demo(**inputs))


def test_text_may_hold_anything(inputs):
    html = render_demo(**with_text_everywhere(inputs, EVIL))
    page = Page(html)
    assert not [tag for tag, attributes in page.elements if tag == "script" or "onerror" in attributes]
    assert page.text.count("<script>alert('caption')</script>") >= 12


def test_characters_that_no_file_can_carry_are_replaced(inputs):
    html = render_demo(**with_text_everywhere(inputs, "cat \ud83d \x00 \x1b[0m"))
    assert "cat \ufffd \ufffd \ufffd[0m" in html.encode("utf-8").decode("utf-8")


@pytest.mark.parametrize(
    "url, linked", [("https://example.org/a?b=c&d", True), ("javascript:alert(1)", False), (None, False)]
)
def test_only_web_addresses_become_links(inputs, url, linked):
    inputs["data_notes"]["licences"][0]["url"] = url
    links = [attributes["href"] for tag, attributes in Page(render_demo(**inputs)).elements if tag == "a"]
    assert (url in links) == linked and "Drawings" in Page(render_demo(**inputs)).text


def test_an_empty_run_is_a_page_that_says_so():
    page = Page(render_demo({}, {}, {}, {}, [], {}, {}))
    assert page.text.count("nothing recorded") == 4 and page.text.count("Nothing was recorded.") == 4
    assert "No verdict" in page.text


def test_a_run_that_broke_down_shows_dashes_and_gaps(inputs):
    for arm in ("dense", "dense_continued", "clip_up"):
        inputs["curves"][arm] = [{"step": 1, "loss": float("nan")}, {"step": None}, {}]
        inputs["evaluations"][arm] = [{"step": 1, "text_to_image_R@1": float("inf")}]
        inputs["report"][arm] = {"text_to_image_R@1": float("nan"), "splits": None}
    inputs["loads"] = {layer: {"steps": [1], "load": [[float("nan")] * 8]} for layer in inputs["loads"]}
    page = Page(render_demo(**inputs))
    assert "No verdict" in page.text and "–" in page.words
    assert not re.search(r"\b(nan|inf)\b", page.text.lower())


def test_the_contrastive_loss_is_drawn_and_not_the_sum_with_the_auxiliary_losses(inputs):
    without = render_demo(**inputs)
    for records in inputs["curves"].values():
        for record in records:
            record["loss"] += 100
    assert render_demo(**inputs) == without


def test_continuations_are_drawn_from_the_model_that_they_start_from(inputs):
    tooltips = re.findall(r"<title>(CLIP-UP, step 600: [^<]*)</title>", render_demo(**inputs))
    assert tooltips == ["CLIP-UP, step 600: 17.8%", "CLIP-UP, step 600: 18.5%"]


def test_what_the_page_does_not_know_is_in_its_footer(inputs):
    inputs["report"] |= {"versions": {"torch": "9.9"}, "note": "hello"}
    inputs["report"]["dense"]["learning_rate"] = 0.123
    inputs["report"]["data"]["seed"] = 77
    footer = Page(render_demo(**inputs).split("<footer>")[1].split("</footer>")[0]).text
    for shown in ("Abacus-7", "torch 9.9", "note hello", "learning_rate 0.123", "seed 77"):
        assert shown in footer


def test_commands_of_the_report_are_what_reproduces_it(inputs):
    assert "make demo" in Page(render_demo(**inputs)).text
    inputs["report"]["commands"] = ["clipup demo --seed 3"]
    assert "clipup demo --seed 3" in Page(render_demo(**inputs)).text


def test_a_page_stays_under_3_mb_whatever_it_is_given(make):
    inputs = make.inputs(make.report(), experts=16)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 480, 3), dtype=np.uint8))
    found = {"caption": "x" * 100_000, "target": photo, "rank": 2, "retrieved": [photo] * 5, "model": "clip_up"}
    inputs["retrievals"] = {"best": [found] * 40, "worst": [found] * 40}
    layers = {f"visual.transformer.resblocks.{i}.mlp": np.zeros((14, 14), dtype=int) for i in range(1, 4, 2)}
    inputs["routing"] = [{"image": photo, "caption": "x" * 100_000, "layers": layers}] * 40
    inputs["loads"] = {f"transformer.resblocks.{i}.mlp": next(iter(inputs["loads"].values())) for i in range(12)}
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
