"""Results of logs: chosen learning rates, costs along a chain of runs, spread and paired differences."""

import math

import numpy
import pytest

from studies.runner import figures, log, results
from studies.runner.tables import Tables

CHOICES = {
    "a bad seed that the other rate lacks": ({0.1: {0: 0.50}, 0.2: {0: 0.52, 1: 0.10}}, 0.2),
    "a rate dropped after one seed": (
        {0.1: {0: 0.4}, 0.2: {0: 0.5, 1: 0.6, 2: 0.7}, 0.4: {0: 0.52, 1: 0.55, 2: 0.56}},
        0.2,
    ),
    "ahead with one seed": ({0.1: {0: 0.6}, 0.2: {0: 0.5, 1: 0.7}, 0.4: {0: 0.4, 1: 0.9}}, 0.1),
    "ahead with the seeds that two have": (
        {0.1: {0: 0.5, 1: 0.6, 2: 0.1}, 0.2: {0: 0.52, 1: 0.55}, 0.4: {0: 0.2}},
        0.1,
    ),
    "a circle": ({0.1: {0: 0.6, 2: 0.5}, 0.2: {0: 0.5, 1: 0.6}, 0.4: {1: 0.5, 2: 0.6, 3: 0.1}}, 0.4),
}


@pytest.mark.parametrize("case", CHOICES)
def test_an_arm_takes_the_rate_that_is_best_on_validation_over_the_seeds_of_both(write, make_records, case):
    rates, best = CHOICES[case]
    logs = [
        make_records(f"{lr}-{seed}", lr=lr, seed=seed, score=1 - score, validation=score)
        for lr, of_rate in rates.items()
        for seed, score in of_rate.items()
    ]
    runs = write(*logs, make_records("other", arm="dense", score=0.9))

    chosen = results.chosen(runs.values())

    assert [one.name for one in chosen["m", 5, "clip_up"]] == [f"{best}-{seed}" for seed in sorted(rates[best])]
    assert [one.name for one in chosen["m", 5, "dense"]] == ["other"]


def test_a_run_includes_the_cost_of_its_starts_and_is_grouped_by_budget(write, make_records):
    runs = write(
        make_records("base", gflops=10.0),
        make_records("middle", start="base", gflops=5.0),
        make_records("top", start="middle", gflops=2.0, budget=3),
    )
    tables = Tables(runs)
    assert tables.pflop(runs["top"]) == pytest.approx(17e-6)
    assert set(tables.of_start(5).results) == {"base", "middle", "top"}
    assert runs["top"].group == ("m", 3, "clip_up") and runs["base"].group.budget == 5


def test_a_lead_over_seeds_is_a_mean_with_students_interval(write, make_records):
    scores = enumerate((0.52, 0.53, 0.57))
    ours = [make_records(f"a{seed}", seed=seed, score=score) for seed, score in scores]
    theirs = [make_records(f"b{seed}", "dense", seed=seed, score=0.50) for seed in (2, 1, 0, 3)]
    runs = write(*ours, *theirs)
    ours, theirs = ([run for run in runs.values() if run.name[0] == arm] for arm in "ab")

    lead = results.lead(ours, theirs, ["test_styles"], ["text_to_image"])

    expected = 4.302653 * numpy.std([0.02, 0.03, 0.07], ddof=1) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert lead == (pytest.approx(0.04), pytest.approx(expected, rel=1e-3), 3, "R@1")
    every = results.lead(ours, theirs)  # a half of it from images to texts, a fifth of both on names
    assert every.mean == pytest.approx(0.04 * (1 + 0.5 + 0.2 + 0.1) / 4)
    nll = results.lead(ours, theirs, ["test_names"], ["image_to_text"], "nll")
    assert nll.mean == pytest.approx(-0.04 * 0.1)
    one_seed = results.lead(ours[:1], theirs)
    sure = [shown._replace(half_width=abs(shown.mean) / 2) for shown in (lead, nll)]
    worse = nll._replace(mean=-nll.mean, half_width=abs(nll.mean) / 2)
    assert [str(one) for one in (*sure, worse)] == ["**+4.00 ± 2.00**", "**-0.004 ± 0.002**", "*+0.004 ± 0.002*"]
    assert [str(one) for one in (lead, one_seed)] == [f"+4.00 ± {100 * expected:.2f}", "+0.90"]
    assert results.lead(ours[:1], theirs[3:]) is None


def test_a_truncated_log_is_refused(tmp_path, make_records):
    log.write(tmp_path / "a.jsonl", make_records("a")[:-1])
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        results.read(tmp_path)


def test_steps_that_were_not_applied_are_left_out_of_a_logs_means():
    records = [{"step": step, "lr": 0.1, "loss": loss} for step, loss in ((1, 2.0), (2, None), (3, 4.0))]
    assert [line["loss"] for line in log.training(records, steps=150)] == [3.0]
    assert [line["loss"] for line in log.training(records[1:2], steps=150)] == [None]


def test_logs_that_cannot_be_compared_are_refused(write, make_records):
    logs = [make_records("a", lr=0.1, seed=0), make_records("b", lr=0.2, seed=1), make_records("c", "dense", seed=1)]
    logs[1][-1]["machine"] = {"processor": "a new CPU"}
    logs[2][0]["data"] = {**logs[2][0]["data"], "fingerprint": "g"}
    runs = write(*logs)
    with pytest.raises(ValueError, match="no seed in common"):
        results.chosen(runs.values())
    with pytest.raises(ValueError, match="seed 1"):
        Tables(runs).machines()
    with pytest.raises(ValueError, match="2 different data sets"):
        Tables(runs).data()


def of_width(write, make_records, width, gflops, scores):
    """Tables of one model: a start for each of the scores, and the arms that continue it."""
    logs = []
    for seed, (start, arms) in enumerate(scores):
        base = f"{width}-{seed}"
        logs.append(make_records(base, "dense", seed=seed, score=start, gflops=2e6))
        for arm, score in arms.items():
            logs.append(make_records(f"{arm}-{base}", arm, seed=seed, start=base, score=score, gflops=1e6))
    for one in logs:
        one[0]["model"], one[-1]["gflops_per_pair"] = width, gflops
        one[2]["contrastive"] = 1 - 2 * one[3]["text_to_image_R@1"]  # of the last window
    runs = write(*logs)
    return Tables({name: run for name, run in runs.items() if run.config["model"] == width})


def test_leads_over_a_larger_model_are_not_paired_and_costs_are_shares_of_its_flops(write, make_records):
    narrow = of_width(
        write, make_records, "narrow", 0.004, [(0.40, {"clip_up": 0.50}), (0.42, {"clip_up": 0.54}), (0.44, {})]
    )
    wide = of_width(write, make_records, "wide", 0.016, [(0.48, {"more": 0.60}), (0.50, {"more": 0.62}), (0.52, {})])

    head, *rows = narrow.leads_over_larger(wide, ["dense", "more"], ["test_styles"])

    row, dense = (dict(zip(head, one, strict=True)) for one in rows)
    assert (row["seeds"], row["share %"], row["PFLOP"], row["R@1 %"]) == ("2", "25", "3.000", "39.00")
    # three quarters of a score: images to texts have half of it. Welch: 4 and 1.5 degrees of freedom
    assert dense["minus dense"] == f"*-6.00 ± {0.75 * 2.776 * 100 * 0.02 * math.sqrt(2 / 3):.2f}*"
    assert row["minus more"] == f"-6.75 ± {0.75 * 12.706 * 100 * math.sqrt(0.02**2 / 1 + 0.01**2 * 1):.2f}"
    assert row["minus more, NLL"].startswith("+0.067 ± ")
    one_seed = of_width(write, make_records, "one", 0.004, [(0.40, {})])
    assert one_seed.leads_over_larger(wide, ["dense"])[1][-1] == "–"

    drawn = figures.models([wide, narrow], {"dense": "dense", "clip_up": "clip up"})
    assert ">dense<" in drawn and ">clip up<" in drawn


def test_an_arm_is_compared_with_the_line_between_two_widths(write, make_records):
    narrow = of_width(write, make_records, "narrow", 0.004, [(0.40, {"clip_up": 0.48}), (0.44, {"clip_up": 0.52})])
    wide = of_width(write, make_records, "wide", 0.016, [(0.60, {}), (0.64, {})])
    for run in narrow.shortest("clip_up"):
        run.cost["gflops_per_pair"] = 0.008

    # at half of the way in log FLOPs and a third in FLOPs; four cells hold 0.45 of a score
    assert narrow.lead_over_chord("clip_up", "dense", wide, "log") == "*-0.90 ± 0.00*"
    assert narrow.lead_over_chord("clip_up", "dense", wide, "linear") == "**+0.60 ± 0.00**"
    both = Tables(narrow.results | wide.results)
    assert both.line_closes("clip_up-narrow-0", ["narrow-0", "wide-0"]) == pytest.approx(50)
    assert narrow.lead("clip_up", "dense", measure="loss") == "**-0.160 ± 0.000**"
