import re

from html_page import Page, assert_stands_alone

from clipup.demo import comparison_tables
from clipup.demo.page import render_demo

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


def test_a_model_that_came_trained_has_no_curve_of_its_training(inputs):
    inputs["report"]["dense"]["steps"] = 0
    for records in (inputs["curves"], inputs["evaluations"]):
        del records["dense"]
    page = render_demo(**inputs)
    assert "upcycled</text>" not in page and "A dense CLIP trained on other images" in page
