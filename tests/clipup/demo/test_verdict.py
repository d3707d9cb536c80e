import copy
import re

import pytest

from clipup.demo.verdict import verdict

DENSE_TO_IMAGE, DENSE_TO_TEXT = 0.231, 0.239


@pytest.mark.parametrize(
    "lead_to_image, lead_to_text, standing",
    [
        (0.06, 0.05, "CLIP-UP is ahead of the dense baseline (continued training):"),
        (-0.06, -0.05, "CLIP-UP is behind the dense baseline (continued training):"),
        (
            0.06,
            -0.05,
            "CLIP-UP is ahead of the dense baseline (continued training) in one direction and behind it in the other:",
        ),
        (
            -0.06,
            0.05,
            "CLIP-UP is ahead of the dense baseline (continued training) in one direction and behind it in the other:",
        ),
        (0.0, 0.0, "CLIP-UP and the dense baseline (continued training) are level:"),
        (0.0004, -0.0004, "CLIP-UP and the dense baseline (continued training) are level:"),
        (0.012, 0.008, "CLIP-UP and the dense baseline (continued training) are level within the sampling error:"),
        (-0.03, 0.03, "CLIP-UP and the dense baseline (continued training) are level within the sampling error:"),
        (
            0.06,
            0.01,
            "CLIP-UP is ahead of the dense baseline (continued training) in one direction and level in the other:",
        ),
        (
            0.0,
            -0.06,
            "CLIP-UP is behind the dense baseline (continued training) in one direction and level in the other:",
        ),
    ],
)
def test_the_verdict_says_which_way_it_fell(make, lead_to_image, lead_to_text, standing):
    found = verdict(make.report(DENSE_TO_IMAGE + lead_to_image, DENSE_TO_TEXT + lead_to_text))
    assert standing in found.sentence


def test_a_lead_counts_from_two_standard_errors_on(make):
    report = make.report(0.5, DENSE_TO_TEXT)
    report["dense_continued"]["text_to_image_R@1"], report["data"]["test_images"] = (
        0.4,
        200,
    )  # 2 sqrt((.24 + .25) / 196) = 0.1
    assert "is ahead of" in verdict(report).sentence
    report["data"]["test_images"] = 192
    assert "level within the sampling error" in verdict(report).sentence
    del report["data"]["test_images"]
    assert "is ahead of" in verdict(report).sentence


def test_the_verdict_gives_both_differences_in_points_with_what_they_are_made_of(make):
    sentence = verdict(make.report(0.2191, 0.2461)).sentence.replace("\u00a0", " ")
    assert "−1.2 points of R@1 text → image (21.9 against 23.1 %)" in sentence
    assert "+0.7 points of R@1 image → text (24.6 against 23.9 %)" in sentence


def test_a_win_and_a_loss_are_told_in_the_same_words(make):
    win, loss = (verdict(make.report(DENSE_TO_IMAGE + lead, DENSE_TO_TEXT + lead)) for lead in (0.06, -0.06))
    without = [
        re.sub(r"ahead of|behind", "", re.sub(r"[+−]?\d+\.\d", "0", " ".join([found.sentence, *found.notes])))
        for found in (win, loss)
    ]
    assert without[0] == without[1]


def test_one_seed_is_named_and_significance_is_not_claimed(report):
    found = verdict(report)
    assert "with one seed" in found.sentence
    assert any(
        "No claim of significance" in note and "below 3.8 points (2 standard errors)" in note for note in found.notes
    )


def test_more_compute_at_equal_steps_is_admitted(report):
    assert any("1.32 times the FLOPs" in note for note in verdict(report).notes)


def test_unequal_steps_are_admitted(report):
    report["clip_up"]["steps"] = 800
    assert verdict(report).sentence.startswith("At unequal steps (800 against 400)")


@pytest.mark.parametrize("broken", [None, float("nan"), "?"])
def test_there_is_no_verdict_without_the_numbers(report, broken):
    report = copy.deepcopy(report)
    report["clip_up"]["text_to_image_R@1"] = broken
    assert verdict(report) == ("No verdict: text_to_image_R@1 of clip_up is not in the report.", ())
    del report["clip_up"]
    assert verdict(report).sentence.startswith("No verdict: text_to_image_R@1 of clip_up, image_to_text_R@1 of clip_up")
