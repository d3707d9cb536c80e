import pytest

from clipup.demo.verdict import verdict

DENSE_TO_IMAGE, DENSE_TO_TEXT = 0.231, 0.239


@pytest.mark.parametrize(
    "lead_to_image, lead_to_text, standing",
    [
        (0.06, 0.05, "is ahead of THEM ("),
        (-0.06, -0.05, "is behind THEM ("),
        (0.06, -0.05, "is ahead of THEM in one direction and behind it in the other ("),
        (-0.06, 0.05, "is ahead of THEM in one direction and behind it in the other ("),
        (0.0, 0.0, "and THEM are level within sampling error ("),
        (-0.03, 0.03, "and THEM are level within sampling error ("),
        (0.06, 0.01, "is ahead of THEM in one direction and level in the other ("),
        (0.0, -0.06, "is behind THEM in one direction and level in the other ("),
    ],
)
def test_the_verdict_says_which_way_it_fell(make_report, lead_to_image, lead_to_text, standing):
    found = verdict(make_report(DENSE_TO_IMAGE + lead_to_image, DENSE_TO_TEXT + lead_to_text))
    assert f"CLIP-UP {standing.replace('THEM', 'continued dense training')}" in found.sentence


@pytest.mark.parametrize(("test_images", "standing"), [(200, "is ahead of"), (192, "level within sampling error")])
def test_a_lead_counts_from_two_standard_errors_on(make_report, test_images, standing):
    report = make_report(0.5, DENSE_TO_TEXT)
    report["dense_continued"]["text_to_image_R@1"] = 0.4  # 2 sqrt((.24 + .25) / 196) = 0.1
    report["data"]["test_images"] = test_images
    assert standing in verdict(report).sentence
