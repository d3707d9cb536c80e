from html_page import Page, assert_stands_alone

from clipup.demo import comparison_tables
from clipup.demo.page import render_demo


def test_the_page_has_every_number_and_stands_alone(inputs):
    html = render_demo(**inputs)
    page = Page(html)
    assert html.startswith("<!doctype html>") and "A trained dense CLIP was turned into a sparse" in html
    assert_stands_alone(html)
    shown = [make(inputs["report"]) for make in (comparison_tables.overview, comparison_tables.splits)]
    assert {cell for table in shown for one in table.columns for cell in one.cells} - {""} <= set(page.words)
    first_screen = page.text.split(" Training ")[0]
    assert "Best" in first_screen and "Worst" in first_screen and "least to most used expert" not in first_screen
    assert "gallery of 1,012 images and 3,988 captions, chance R@1 0.099 %" in first_screen
    assert "at most 3.0e-07 before the first step" in first_screen
    assert "Abacus-7" in page.text and "blocks.image 1, 3" in page.text
    assert '<p class="statement" id="verdict">CLIP-UP ' in html
