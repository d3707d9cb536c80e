"""The tables of a study have the numbers of the logs. The committed page is compared with its logs as a whole."""

from __future__ import annotations

import pytest

from studies.runner.tables import Tables

OTHERS = {"dense_continued": "at equal steps", "dense_equal_flops": "at equal FLOPs"}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture
def several(write, make_records):
    """Three seeds of CLIP-UP and of two dense arms from one start, and one of LIMoE."""
    logs = [make_records("start", "dense", score=0.1)]
    for seed, score in enumerate((0.52, 0.53, 0.54)):
        logs += [make_records(f"sparse-{seed}", "clip_up", seed=seed, score=score, start="start")]
        logs += [make_records(f"dense-{seed}", "dense_continued", seed=seed, score=0.50, start="start")]
        logs += [make_records(f"more-{seed}", "dense_equal_flops", seed=seed, score=0.53, start="start")]
    return Tables(write(*logs, make_records("limoe", "limoe", score=0.50, start="start")))


def test_retrieval_is_given_at_the_chosen_rate_with_its_spread_over_seeds(found):
    head, _, *lines = rows(Tables(found).retrieval("test_styles"))
    by_arm = {line[0]: line[1:] for line in lines}

    assert head[5:] == ["text_to_image_R@1 %", "R@5 %", "NLL", "image_to_text_R@1 %", "R@5 %", "NLL"]
    assert set(by_arm) == {"dense", "dense continued", "clip up"}
    assert by_arm["dense"] == ["5", "0.1", "1", "2.000", "40.0", "60.0", "1.600", "20.0", "30.0", "1.800"]
    assert by_arm["dense continued"][1] == "0.1" and by_arm["dense continued"][4] == "50.0"
    assert by_arm["clip up"][2:5] == ["2", "3.500", "54.0 ± 2.8"]  # with the start's FLOPs
    galleries = Tables(found).galleries()
    assert galleries["validation"] == {
        "images": 8,
        "captions": 5,
        "chance": 0.2,
        "uniform_nll": pytest.approx(1.6094, abs=1e-4),
    }


def test_leads_and_verdict_are_those_over_all_seeds(several):
    head, _, *lines = rows(several.leads("clip_up"))
    by_arm = {line[0]: line[1:] for line in lines}

    assert set(by_arm) == {"dense continued", "dense equal flops", "limoe"}  # not what it started from
    assert head[3:5] == ["styles text_to_image", "styles image_to_text"] and head[-2:] == ["mean", "NLL"]
    points = ["+3.00 ± 2.48", "+1.50 ± 1.24", "+0.60 ± 0.50", "+0.30 ± 0.25", "+1.35 ± 1.12", "-0.013 ± 0.011"]
    assert by_arm["dense continued"] == ["5", "3", *(f"**{cell}**" for cell in points)]
    assert by_arm["dense equal flops"][:3] == ["5", "3", "+0.00 ± 2.48"]
    assert by_arm["limoe"] == ["5", "1", "+2.00", "+1.00", "+0.40", "+0.20", "+0.90", "-0.009"]
    assert several.verdict("clip_up", OTHERS | {"limoe": "of losses"}) == (
        "at equal steps (5; 3 seeds) better, **+1.35 ± 1.12**; "
        "at equal FLOPs (5; 3 seeds) not decided, +0.00 ± 1.12; "
        "with one seed each, which decides nothing: of losses (5) +0.90"
    )
    assert several.verdict("dense_continued", {"clip_up": "then"}) == "then (5; 3 seeds) worse, **-1.35 ± 1.12**"
    nll = "then (5; 3 seeds) better, **-0.013 ± 0.011**"  # less is better
    assert several.verdict("clip_up", {"dense_continued": "then"}, "nll") == nll
    assert several.verdict("clip_up", {"drop": "then"}) == "there is no run to compare yet"
    flops_first = {"dense_equal_flops": "f", "limoe": "l", "dense_continued": "s"}  # in the order that is asked for
    assert several.comparisons("clip_up", flops_first) == [
        ["f", "5", "3", "+0.00 ± 1.12", "not decided"],
        ["l", "5", "1", "+0.90", "one seed"],
        ["s", "5", "3", "**+1.35 ± 1.12**", "better"],
    ]


def test_a_seed_is_of_one_machine_and_all_logs_of_one_data_set(write, make_records):
    logs = [make_records(f"run-{seed}", seed=seed) for seed in (0, 1, 2)]
    logs[2][-1]["machine"] = {"processor": "a new CPU"}
    assert rows(Tables(write(*logs)).machines())[2:] == [["a CPU", "0, 1"], ["a new CPU", "2"]]
    other = make_records("other", "dense", seed=2)
    other[0]["data"] = {**other[0]["data"], "fingerprint": "g"}
    tables = Tables(write(other))
    with pytest.raises(ValueError, match="seed 2"):
        tables.machines()
    with pytest.raises(ValueError, match="2 different data sets"):
        tables.data()
