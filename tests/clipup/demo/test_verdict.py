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


def test_the_verdict_gives_both_differences_in_points_with_what_they_are_made_of(make):
    sentence = verdict(make.report(0.2191, 0.2461)).sentence.replace("\u00a0", " ")
    assert "−1.2 points of R@1 text → image (21.9 against 23.1 %)" in sentence
    assert "+0.7 points of R@1 image → text (24.6 against 23.9 %)" in sentence
