import pytest

from clipup.demo import comparison_tables
from clipup.demo.comparison_tables import comparison_table


def test_the_terminal_table_is_ascii_of_100_columns_with_chance_gallery_and_verdict(make):
    text = comparison_table(make.report(0.2, 0.2))
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert "behind the dense baseline (continued training)" in " ".join(text.split())
    first, *rest = text.splitlines()
    assert "gallery of 1,012 images and 3,988 captions, chance R@1 0.099 %" in first
    assert any("emoji, gallery 402" in line and "concepts, gallery 894" in line for line in rest)
    chances = [line.split()[1:] for line in rest if line.startswith("Chance")]
    assert chances == [["0.099", "0.099"], ["0.25", "0.25", "0.11", "0.11"]]


def test_every_arm_has_its_recalls_and_costs(report):
    text = comparison_table(report)
    recalls, costs, *_ = [line.split()[1:] for line in text.splitlines() if line.startswith("CLIP-UP  ")]
    assert recalls == ["24.3", "46.2", "58.4", "24.6", "46.8", "59.1"]
    assert costs == ["400", "78", "1.772", "1.013", "0.0163"]


def test_the_last_rows_compare_clip_up_with_the_dense_model_continued(report):
    assert [one.cells[-1] for one in comparison_tables.quality(report).columns] == [
        "+1.2",
        "+2.3",
        "+3.0",
        "+0.7",
        "+1.3",
        "+1.7",
    ]
    assert [one.cells[-1] for one in comparison_tables.cost(report).columns] == [
        "×1.00",
        "×1.34",
        "×2.10",
        "×1.20",
        "×1.32",
    ]


@pytest.mark.parametrize("difference, said", [(2.98e-7, "at most 3.0e-07"), (3e-3, "more than rounding")])
def test_the_difference_at_step_zero_is_judged(report, difference, said):
    report["upcycled_step0"]["max_feature_difference"] = difference
    assert said in " ".join(comparison_table(report).split())
