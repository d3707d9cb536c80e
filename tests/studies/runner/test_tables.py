"""The tables and figures of a study: their numbers are those of the logs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from clipup.inspection.figures.format import MISSING
from studies.runner.figures import figures
from studies.runner.tables import Tables


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_retrieval_is_given_at_the_chosen_rate_with_its_spread_over_seeds(found):
    head, _, *lines = rows(Tables(found).retrieval("test_styles"))
    by_arm = {line[0]: dict(zip(head, line, strict=True)) for line in lines}

    assert set(by_arm) == {"dense", "dense continued", "clip up"}
    assert by_arm["dense continued"]["lr"] == "0.1" and by_arm["dense continued"]["text_to_image_R@1 %"] == "50.0"
    assert by_arm["clip up"]["seeds"] == "2" and by_arm["clip up"]["text_to_image_R@1 %"] == "54.0 ± 2.8"
    assert by_arm["clip up"]["PFLOP"] == "3.500" and by_arm["dense"]["PFLOP"] == "2.000"  # with the start's
    assert head[5:] == ["text_to_image_R@1 %", "R@5 %", "NLL", "image_to_text_R@1 %", "R@5 %", "NLL"]
    assert next(line for line in lines if line[0] == "dense")[5:] == ["40.0", "60.0", "1.600", "20.0", "30.0", "1.800"]
    names = rows(Tables(found).retrieval("test_names"))[2:]
    assert next(line for line in names if line[0] == "dense")[5:] == ["8.0", "12.0", "1.920", "4.0", "6.0", "1.960"]


def test_the_size_of_a_gallery_and_the_chance_of_guessing_are_known(found):
    galleries = Tables(found).galleries()

    assert galleries["validation"] == {
        "images": 8,
        "captions": 5,
        "chance": 0.2,
        "uniform_nll": pytest.approx(1.609, abs=1e-3),
    }
    assert galleries["test_names"] == {
        "images": 8,
        "captions": 8,
        "chance": 0.125,
        "uniform_nll": pytest.approx(2.079, abs=1e-3),
    }


def test_leads_and_verdict_are_those_over_all_seeds(write, make_records):
    logs = [make_records("start", "dense", score=0.1)]
    for seed, score in enumerate((0.52, 0.53, 0.54)):
        logs += [make_records(f"sparse-{seed}", "clip_up", seed=seed, score=score, start="start")]
        logs += [make_records(f"dense-{seed}", "dense_continued", seed=seed, score=0.50, start="start")]
        logs += [make_records(f"more-{seed}", "dense_equal_flops", seed=seed, score=0.53, start="start")]
    logs += [make_records("limoe", "limoe", score=0.50, start="start")]
    tables = Tables(write(*logs))

    _, _, *lines = rows(tables.leads("clip_up"))
    by_arm = {line[0]: line[1:] for line in lines}

    assert set(by_arm) == {"dense continued", "dense equal flops", "limoe"}  # not what it started from
    ways = [f"{split} {way}" for split in ("styles", "names") for way in ("text_to_image", "image_to_text")]
    assert rows(tables.leads("clip_up"))[0][3:] == [*ways, "mean", "NLL"]
    points = ["+3.00 ± 2.48", "+1.50 ± 1.24", "+0.60 ± 0.50", "+0.30 ± 0.25", "+1.35 ± 1.12", "-0.013 ± 0.011"]
    assert by_arm["dense continued"] == ["5", "3", *(f"**{cell}**" for cell in points)]
    assert by_arm["dense equal flops"][:3] == ["5", "3", "+0.00 ± 2.48"]
    assert by_arm["limoe"] == ["5", "1", "+2.00", "+1.00", "+0.40", "+0.20", "+0.90", "-0.009"]
    words = {"dense_continued": "at equal steps", "dense_equal_flops": "at equal FLOPs", "limoe": "of losses"}
    assert tables.verdict("clip_up", words) == (
        "at equal steps (5; 3 seeds) better, **+1.35 ± 1.12**; "
        "at equal FLOPs (5; 3 seeds) not decided, +0.00 ± 1.12; "
        "with one seed each, which decides nothing: of losses (5) +0.90"
    )
    assert tables.verdict("dense_continued", {"clip_up": "then"}) == "then (5; 3 seeds) worse, **-1.35 ± 1.12**"
    nll = "then (5; 3 seeds) better, **-0.013 ± 0.011**"  # less is better
    assert tables.verdict("clip_up", {"dense_continued": "then"}, "nll") == nll


def test_gains_over_the_start_and_leads_by_split_and_measure_are_for_sentences(write, make_records):
    logs = [make_records("start", "dense", score=0.1)]
    for seed, score in enumerate((0.52, 0.53, 0.54)):
        logs += [make_records(f"sparse-{seed}", "clip_up", seed=seed, score=score, start="start")]
        logs += [make_records(f"dense-{seed}", "dense_continued", seed=seed, score=0.50, start="start")]
    tables = Tables(write(*logs))

    assert tables.gain("clip_up") == "**+19.35 ± 1.12**" and tables.gain("dense_continued") == "**+18.00 ± 0.00**"
    assert tables.gain("clip_up", ["test_styles"]) == "**+32.25 ± 1.86**" and tables.gain("limoe") == MISSING
    assert tables.lead("clip_up", "dense_continued", ["test_styles"]) == "**+2.25 ± 1.86**"
    assert tables.lead("clip_up", "dense_continued", measure="R@5") == "**+2.03 ± 1.68**"  # half as much again


def test_one_seed_decides_nothing(found):
    assert Tables(found).verdict("clip_up", {"dense_continued": "then"}) == (
        "with one seed each, which decides nothing: then (5) +0.90"
    )
    assert Tables(found).verdict("clip_up", {"limoe": "then"}) == "there is no run to compare yet"


def test_differences_are_those_of_runs_with_the_same_seed(found):
    _, _, *lines = rows(Tables(found).differences("clip_up"))

    assert [line[:2] for line in lines] == [["`sparse-a`", "`dense-a`"]]  # the second seed has no dense counterpart
    assert len(lines[0]) == 4 and all(cell.startswith("+50.00 ± ") for cell in lines[0][2:])


def test_every_rate_is_shown_and_the_chosen_one_marked(found):
    _, _, *lines = rows(Tables(found).sweep())

    assert ["dense continued", "5", "**0.1: 37.50**, 0.2: 33.75"] in lines  # the mean of both ways
    assert ["clip up", "5", "**0.1: 39.00 / 42.00**"] in lines


def test_the_seeds_of_a_rate_are_named_where_rates_have_different_ones(write, make_records, found):
    tables = Tables(found | write(make_records("sparse-c", "clip_up", 0.2, start="base", score=0.4)))
    lines = rows(tables.sweep(with_seeds=True))[2:]

    assert ["dense continued", "5", "**0.1: 37.50**, 0.2: 33.75"] in lines
    assert ["clip up", "5", "**0.1 (seeds 0, 1): 39.00 / 42.00**, 0.2 (seeds 0): 30.00"] in lines
    assert ["clip up", "5", "**0.1: 39.00 / 42.00**, 0.2: 30.00"] in rows(tables.sweep())[2:]


def test_how_far_runs_fall_below_their_start_and_when_they_are_back_is_told(write, make_records):
    logs = [make_records(f"start-{seed}", "dense", seed=seed, score=0.4 + seed / 10) for seed in (0, 1)]
    for seed in (0, 1):
        run = make_records(f"sparse-{seed}", seed=seed, start=f"start-{seed}", score=0.6 + seed / 10, steps=20)
        curve = [(5, 0.2), (10, 0.3), (15, 0.5), (20, 0.6)]
        of_split = next(record for record in run if record["kind"] == "validation")
        run = [record for record in run if record["kind"] != "validation"]
        for step, score in curve:
            recalls = {"text_to_image_R@1": score + seed / 10, "image_to_text_R@1": (score + seed / 10) / 2}
            run.insert(-1, of_split | recalls | {"step": step})
        logs.append(run)
    logs += [make_records("low", "dense_continued", start="start-0", score=0.1)]

    table = rows(Tables(write(*logs)).recovery(["dense_continued", "clip_up", "limoe"]))

    assert table[0][3:] == ["start", "lowest", "after", "at the start's level after", "end"]
    assert table[2:] == [
        ["dense continued", "5", "1", "30.00", "7.50", "20%", "–", "7.50"],
        ["clip up", "20", "2", "33.75", "18.75", "25%", "75%", "48.75"],
    ]


def test_leads_at_one_rate_for_both_arms_tell_what_tuning_one_alone_would_give(write, make_records):
    logs = [make_records("start", "dense", score=0.1)]
    for lr, sparse, dense in ((0.1, 0.52, 0.50), (0.2, 0.55, 0.56)):
        logs += [make_records(f"sparse-{lr}", "clip_up", lr, score=sparse, start="start")]
        logs += [make_records(f"dense-{lr}", "dense_continued", lr, score=dense, start="start")]
    logs += [make_records("sparse-s1", "clip_up", 0.2, seed=1, score=0.58, start="start")]
    logs += [make_records("dense-s1", "dense_continued", 0.2, seed=1, score=0.55, start="start")]
    logs += [make_records("sparse-s2", "clip_up", 0.2, seed=2, score=0.9, start="start")]  # no dense run of this seed
    logs += [make_records("sparse-long", "clip_up", 0.1, score=0.9, start="start", budget=50)]
    logs += [make_records("dense-long", "dense_continued", 0.1, score=0.1, start="start", budget=50)]

    assert rows(Tables(write(*logs)).leads_by_rate("clip_up", ["dense_continued", "dense_equal_flops"]))[2:] == [
        ["0.1", "+0.90", "1", "–", "–"],
        ["0.2", "+0.45 ± 11.44", "2", "–", "–"],
    ]
    assert rows(Tables(write(*logs)).leads_by_rate("limoe", ["dense_continued"]))[2:] == [["–"] * 3]  # no run yet


def test_runs_of_another_study_can_be_shown_beside_these(write, make_records):
    logs = [make_records("start", "dense", score=0.1)]
    for arm, score in (("clip_up", 0.52), ("dense_continued", 0.50)):
        logs += [make_records(f"{arm}-low", arm, lr=0.1, score=score, start="start")]
    apart = [make_records("clip_up-high", lr=0.2, score=0.6, start="start")]
    apart += [make_records("dense-high", "dense_continued", lr=0.2, score=0.5, start="start")]
    found = write(*logs, *apart)
    tables = Tables({name: run for name, run in found.items() if "high" not in name})

    both = tables.with_runs_of(Tables({name: run for name, run in found.items() if "high" in name}))

    lines = rows(both.leads_by_rate("clip_up", ["dense_continued"]))[2:]
    assert lines == [["0.1", "+0.90", "1"], ["0.2", "+4.50", "1"]]
    assert len(rows(tables.leads_by_rate("clip_up", ["dense_continued"]))[2:]) == 1
    assert both.difference("clip_up-high", "dense_continued-low") == "+4.50"
    assert tables.difference("clip_up-high", "dense_continued-low") == MISSING


def test_growth_is_over_the_seeds_that_all_arms_of_a_length_have_at_their_best_rates(write, make_records):
    def record(arm, budget, seed, score, **more):
        name = f"{arm}-{budget}-{more.get('lr', 0.1)}-s{seed}"
        return make_records(name, arm, seed=seed, score=score, start=f"start-{seed}", budget=budget, **more)

    logs = [make_records(f"start-{seed}", "dense", seed=seed, score=0.1 + seed / 10) for seed in (0, 1, 2)]
    for seed in (0, 1):
        logs += [
            record("clip_up", 5, seed, 0.52),
            record("dense_continued", 5, seed, 0.50 + seed / 100),
            record("dense_equal_flops", 5, seed, 0.54),
        ]
    logs += [record("clip_up", 5, 2, 0.99)]  # the others do not have this seed
    logs += [record("clip_up", 5, 0, 0.99, lr=0.2, validation=0.4)]  # not the best on validation
    logs += [record("clip_up", 50, 1, 0.60), record("dense_continued", 50, 1, 0.61)]

    table = Tables(write(*logs)).growth("clip_up", ["dense_continued", "dense_equal_flops"])

    assert rows(table)[0][1:5] == ["seeds", "dense continued", "dense equal flops", "clip up"]
    assert rows(table)[2:] == [
        ["0", "2", "6.75", "6.75", "6.75", "–", "–"],
        ["5", "2", "22.73", "24.30", "23.40", "+0.68 ± 2.86", "**-0.90 ± 0.00**"],
        ["50", "1", "27.45", "–", "27.00", "-0.45", "–"],
    ]
    assert rows(Tables(write(*logs)).growth("limoe", ["dense"]))[2:] == [["–"] * 5]  # no run yet
    logs += [record("limoe", 5, 2, 0.5)]
    with pytest.raises(ValueError, match="dense_continued, limoe of 5 steps have no seed in common: run one more"):
        Tables(write(*logs)).growth("limoe", ["dense_continued"])


def test_recall_is_drawn_over_flops_of_the_arms_with_several_lengths_from_their_start_on(write, make_records):
    logs = [make_records(f"start-{seed}", "dense", seed=seed, score=0.1 + seed / 10, gflops=2e6) for seed in (0, 1)]
    for budget, seeds in ((5, (0, 1)), (50, (0,))):
        for seed in seeds:
            name = f"sparse-{budget}-{seed}"
            logs += [
                make_records(
                    name, seed=seed, score=0.5 + seed / 10, start=f"start-{seed}", budget=budget, gflops=budget * 1e6
                )
            ]
    logs += [make_records("limoe", "limoe", score=0.9, start="start-0")]

    figure = ElementTree.fromstring(figures(Tables(write(*logs)))["recall"])

    points = [title.text for title in figure.iter() if title.tag.endswith("title") and title.text]
    assert not [point for point in points if "limoe" in point]
    assert [point.rpartition("included ")[2] for point in points if "clip up" in point] == [
        "2: 6.75%",
        "7: 24.75%",
        "52: 22.5%",
    ]


def test_experts_and_costs_are_those_of_the_logs(found):
    tables = Tables(found)

    assert ["`sparse-a`", "0.850", "2.00", "2.50", "20.0"] in rows(tables.experts())
    cost = dict(zip(*(rows(tables.costs())[i] for i in (0, 2)), strict=True))
    assert cost["run"] == "`base`" and cost["PFLOP"] == "2.000" and cost["hours, 1 thread"] == "1.00"
    assert cost["epochs"] == "2.5"


def on(records, processor):
    """The log as if it had been made on another machine."""
    records[-1]["machine"] = {"processor": processor}
    return records


def test_the_machines_of_a_study_are_listed_with_their_seeds(write, make_records):
    logs = [on(make_records(f"start-{seed}", "dense", seed=seed), "an old CPU") for seed in (0, 1)]
    logs += [on(make_records(f"sparse-{seed}", seed=seed, start=f"start-{seed}"), "an old CPU") for seed in (0, 1)]
    logs += [on(make_records("start-2", "dense", seed=2), "a new CPU")]

    assert rows(Tables(write(*logs)).machines())[2:] == [["an old CPU", "0, 1"], ["a new CPU", "2"]]


def test_a_seed_whose_runs_are_of_two_machines_is_not_put_on_a_page(write, make_records):
    logs = [on(make_records("start", "dense", seed=3), "an old CPU"), on(make_records("sparse", seed=3), "a new CPU")]

    with pytest.raises(ValueError, match="seed 3 has runs on"):
        Tables(write(*logs)).machines()


def test_a_sentence_can_quote_a_run_and_says_when_there_is_none(found):
    tables = Tables(found)

    assert (tables.validation("sparse-a"), tables.similarity("sparse-a")) == ("39.00", "0.85")
    assert (tables.validation("no-run"), tables.similarity("no-run"), tables.similarity("base")) == ("–",) * 3


def test_logs_of_different_data_are_not_put_on_one_page(write, make_records):
    other = make_records("b", lr=0.2)
    other[0]["data"] = {**other[0]["data"], "fingerprint": "g"}

    with pytest.raises(ValueError, match="2 different data sets"):
        Tables(write(make_records("a"), other)).data()


def of_start(make_records, steps, gain, lead):
    """Logs of a dense start of so many steps; dense at equal FLOPs and CLIP-UP have so much more than equal steps."""
    logs = [make_records(f"start-{steps}", "dense", score=0.2, steps=steps)]
    for arm, score in (("dense_continued", 0.5), ("dense_equal_flops", 0.5 + gain), ("clip_up", 0.5 + lead)):
        for seed in (0, 1):
            logs += [make_records(f"{arm}-{steps}-{seed}", arm, seed=seed, score=score, start=f"start-{steps}")]
    return logs


OTHERS = {"dense_continued": "at equal steps", "dense_equal_flops": "at equal FLOPs"}


def test_starts_of_several_lengths_are_compared_by_what_dense_training_still_gains(write, make_records):
    tables = Tables(write(*of_start(make_records, 50, 0.02, 0.01), *of_start(make_records, 500, 0.0, 0.04)))

    assert tables.starts == [50, 500]
    assert rows(tables.leads_by_start("clip_up", list(OTHERS)))[2:] == [
        ["50", "2", "**+1.50 ± 0.00**", "**+0.45 ± 0.00**", "**-0.45 ± 0.00**"],
        ["500", "2", "+0.00 ± 0.00", "**+1.80 ± 0.00**", "**+1.80 ± 0.00**"],
    ]
    drawn = ElementTree.fromstring(figures(tables)["starts"])
    titles = [title.text for title in drawn.iter() if title.tag.endswith("title") and title.text]
    assert any("500: 1.8" in title for title in titles) and any("50: -0.45" in title for title in titles)
    assert len([path for path in drawn.iter() if "m-4 0V" in path.get("d", "")]) == 4, "an interval at every point"
    with pytest.raises(ValueError, match="clip_up-50-0 and clip_up-500-0 are of one arm, budget"):
        tables.sweep()
    assert set(tables.of_start(50).results) == {name for name in tables.results if name.split("-")[1] == "50"}


def test_starts_are_compared_over_the_seeds_that_all_have(write, make_records):
    logs = [*of_start(make_records, 50, 0.02, 0.01), *of_start(make_records, 500, 0.0, 0.04)]
    for arm in ("dense_continued", "dense_equal_flops", "clip_up"):  # seed 2 of one start alone, with no lead
        logs += [make_records(f"{arm}-500-2", arm, seed=2, score=0.5, start="start-500")]
    tables = Tables(write(*logs))

    assert rows(tables.leads_by_start("clip_up", list(OTHERS)))[3][:4] == [
        "500",
        "2",
        "+0.00 ± 0.00",
        "**+1.80 ± 0.00**",
    ]
    assert tables.of_start(500).lead("clip_up", "dense_continued") == "+1.20 ± 2.58"
    drawn = ElementTree.fromstring(figures(tables)["starts"])
    assert any("500: 1.8" in (title.text or "") for title in drawn.iter() if title.tag.endswith("title"))


def test_a_start_with_fewer_seeds_does_not_take_those_of_the_others(write, make_records):
    logs = []
    for steps in (5, 50, 500):
        logs += [run for run in of_start(make_records, steps, 0.0, 0.04) if steps > 5 or not run[0]["seed"]]
        if steps > 5:
            for arm, score in (("dense_continued", 0.5), ("dense_equal_flops", 0.5), ("clip_up", 0.54)):
                logs += [make_records(f"{arm}-{steps}-2", arm, seed=2, score=score, start=f"start-{steps}")]
    logs += [make_records("extra", "clip_up", seed=3, score=0.9, start="start-500")]  # dense arms lack this seed
    logs += [make_records("extra-dense", "dense_continued", seed=3, score=0.1, start="start-500")]
    tables = Tables(write(*logs))

    lines = rows(tables.leads_by_start("clip_up", list(OTHERS)))[2:]

    assert [line[:2] for line in lines] == [["50", "3"], ["500", "3"]]
    assert all(line[3] == "**+1.80 ± 0.00**" for line in lines)
    drawn = ElementTree.fromstring(figures(tables)["starts"])
    titles = [title.text for title in drawn.iter() if title.tag.endswith("title") and title.text]
    assert any("500: 1.8" in title for title in titles) and not any(" 5: " in title for title in titles)


def test_the_loss_of_continued_runs_is_not_drawn_beside_that_of_their_start(found):
    drawn = ElementTree.fromstring(figures(Tables(found))["loss"])
    text = " ".join(one.text or "" for one in drawn.iter())

    assert "dense continued, 5" in text and "dense, 5" not in text


def test_comparisons_are_in_the_order_that_is_asked_for(write, make_records):
    tables = Tables(write(*of_start(make_records, 50, 0.02, 0.01)))

    order = {"dense_equal_flops": "at equal FLOPs", "dense_continued": "at equal steps"}
    assert [row[0] for row in tables.comparisons("clip_up", order)] == ["at equal FLOPs", "at equal steps"]
    assert [row[0] for row in tables.comparisons("clip_up", OTHERS)] == ["at equal steps", "at equal FLOPs"]


def test_runs_of_other_starts_and_lengths_are_not_mixed(write, make_records):
    logs = of_start(make_records, 50, 0.02, 0.01)
    logs += [make_records("long", "clip_up", score=0.9, start="start-50", budget=50)]
    logs += [make_records("dense-long", "limoe", score=0.1, start="start-50", budget=50)]
    tables = Tables(write(*logs))

    assert tables.lead("clip_up", "limoe") == "–"  # of the longer budget only
    mixed = Tables(write(make_records("other", "clip_up", start="start-50")))
    with pytest.raises(ValueError, match="clip_up-50-0 and other are of one arm"):
        mixed.leads_by_rate("clip_up", ["dense_continued"])


def test_a_start_without_a_log_is_named(write, make_records):
    with pytest.raises(ValueError, match="sparse starts from dense, which has no log"):
        figures(Tables(write(make_records("sparse", start="dense"))))


def test_what_a_start_started_from_belongs_to_it(write, make_records):
    logs = [make_records("dense", "dense", steps=50, gflops=2e6)]
    logs += [make_records("middle", "dense_continued", start="dense", gflops=1e6)]
    logs += [make_records("sparse", start="middle", gflops=1e6)]
    tables = Tables(write(*logs))

    assert tables.starts == [5, 50]
    assert set(tables.of_start(5).results) == {"dense", "middle", "sparse"} and figures(tables)


def test_up_to_twenty_seeds_have_an_interval(write, make_records):
    for count in (20, 21):
        logs = [make_records("start", "dense", score=0.1)]
        for seed in range(count):
            logs += [make_records(f"s{seed}", seed=seed, score=0.5 + 0.2 * (seed % 2), start="start")]
            logs += [make_records(f"d{seed}", "dense_continued", seed=seed, score=0.5, start="start")]
        tables = Tables(write(*logs))
        if count == 20:
            assert tables.lead("clip_up", "dense_continued") == "**+4.50 ± 2.16**"
    with pytest.raises(ValueError, match="at most 20 seeds, got 21"):
        tables.lead("clip_up", "dense_continued")


def test_comparisons_are_rows_with_a_verdict(write, make_records):
    logs = of_start(make_records, 50, 0.02, 0.01)
    logs += [make_records("once", "limoe", score=0.3, start="start-50")]
    tables = Tables(write(*logs))

    assert tables.comparisons("clip_up", OTHERS | {"limoe": "of losses"}) == [
        ["at equal steps", "5", "2", "**+0.45 ± 0.00**", "better"],
        ["at equal FLOPs", "5", "2", "**-0.45 ± 0.00**", "worse"],
        ["of losses", "5", "1", "+9.45", "one seed"],
    ]
    assert tables.lead("dense_equal_flops", "dense_continued", ["validation"], [1]) == "+1.50"
    assert tables.lead("dense_equal_flops", "dense_continued", ["validation"], [7]) == "–"
