"""Results of logs: chosen learning rates, costs along a chain of runs, spread and paired differences."""

import math

import numpy
import pytest
from scipy import stats

from studies.runner import figures, log, results
from studies.runner.tables import Hypothesis, Tables, decided

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
    assert lead[:4] == (pytest.approx(0.04), pytest.approx(expected), 3, "R@1")
    assert lead.p == pytest.approx(stats.ttest_1samp([0.02, 0.03, 0.07], 0).pvalue)
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
    logs[2][0]["data"] = {**logs[2][0]["data"], "fingerprint": "g"}
    runs = write(*logs)
    with pytest.raises(ValueError, match="no seed in common"):
        results.chosen(runs.values())
    with pytest.raises(ValueError, match="2 different data sets"):
        Tables(runs).data()


def welch(ours, theirs):
    """The p of Welch's test and half of its 95 % interval."""
    test = stats.ttest_ind(ours, theirs, equal_var=False)
    interval = test.confidence_interval()
    return test.pvalue, (interval.high - interval.low) / 2


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
    assert dense["minus dense"] == f"*-6.00 ± {75 * welch([0.40, 0.42, 0.44], [0.48, 0.50, 0.52])[1]:.2f}*"
    assert row["minus more"] == f"-6.75 ± {75 * welch([0.50, 0.54], [0.60, 0.62])[1]:.2f}"
    assert row["minus more, NLL"].startswith("+0.067 ± ")
    one_seed = of_width(write, make_records, "one", 0.004, [(0.40, {})])
    assert one_seed.leads_over_larger(wide, ["dense"])[1][-1] == "–"

    lines = {"start": [narrow.shortest("dense"), wide.shortest("dense")], "clip up": [narrow.shortest("clip_up")]}
    drawn = figures.models(lines, "which is better")
    assert all(f">{text}<" in drawn for text in ("which is better", "start", "clip up", "4", "16"))


def test_an_arm_is_compared_with_the_line_between_two_widths(write, make_records):
    narrow = of_width(write, make_records, "narrow", 0.004, [(0.40, {"clip_up": 0.48}), (0.44, {"clip_up": 0.54})])
    wide = of_width(write, make_records, "wide", 0.016, [(0.60, {}), (0.64, {})])
    for run in narrow.shortest("clip_up"):
        run.cost["gflops_per_pair"] = 0.008

    # at half of the way in log FLOPs; four cells hold 0.45 of a score
    line = [of.shortest("dense") for of in (narrow, wide)]
    assert str(results.lead_over_line([narrow.shortest("clip_up")], line)) == "-0.45 ± 5.72"
    saved = results.flops_saved(narrow.shortest("clip_up")[:1], line, ["test_styles"])
    assert saved == ([pytest.approx(0.004 * 4**0.4 / 0.008)], "")
    ends = [results.flops_saved(of.shortest("dense")[:1], line, ["test_names"]) for of in (narrow, wide)]
    assert ends == [([pytest.approx(1)], "")] * 2
    outside = [results.flops_saved(line[at][:1], line[1 - at :][:1] * 2, ["test_names"]) for at in (0, 1)]
    assert outside == [([pytest.approx(4)], "<"), ([pytest.approx(1 / 4)], ">")]
    assert results.flops_saved(line[0], line[::-1], ["test_names"]) == ([], "")  # it falls
    assert narrow.lead("clip_up", "dense", measure="loss") == "-0.180 ± 0.254"


def test_arms_are_compared_with_the_line_of_several_and_contrasts_of_arms_are_welchs(write, make_records):
    scores = {
        "small": ([0.10, 0.12, 0.13], 1),
        "middle": ([0.30, 0.36, 0.33], 2),
        "large": ([0.40, 0.41, 0.48], 8),
        "sparse": ([0.34, 0.35, 0.37], math.sqrt(2)),
        "sparser": ([0.36, 0.40, 0.41], 4),
        "sparse and best": ([0.39, 0.40, 0.50], 5),
    }
    logs = []
    for arm, (of_seed, mflop) in scores.items():
        for seed, score in enumerate(of_seed):
            layers = {"visual": {"load": 1.0}} if "sparse" in arm else None
            logs.append(make_records(f"{arm}-{seed}", arm, seed=seed, score=score, layers=layers))
            logs[-1][-1]["gflops_per_pair"] = mflop / 1000
    tables = Tables(write(*logs))
    values = {arm: numpy.array(of_seed) for arm, (of_seed, _) in scores.items()}
    runs = {arm: tables.shortest(arm) for arm in scores}

    # at half of the way from small to middle in log FLOPs, and of that from middle to large
    sparse = values["sparse"] - (values["small"] + values["middle"]) / 2
    sparser = values["sparser"] - (values["middle"] + values["large"]) / 2
    line = [runs["small"], runs["middle"], runs["large"]]
    both = results.lead_over_line([runs["sparse"], runs["sparser"]], line, ["test_styles"])
    assert both.mean == pytest.approx(0.75 * ((sparse + sparser) / 2).mean())
    assert both.p == pytest.approx(stats.ttest_1samp((sparse + sparser) / 2, 0).pvalue)

    difference = results.contrast([runs["sparser"]], [runs["large"]], ["test_styles"])
    assert difference.p == pytest.approx(welch(values["sparser"], values["large"])[0])
    within = results.contrast([runs["sparser"]], [runs["large"]], ["test_styles"], margin=0.06)
    assert within.p == pytest.approx(welch(values["sparser"] + 0.06 / 0.75, values["large"])[0])
    assert within[:3] == difference[:3]
    arms = [[runs["sparser"], runs["small"]], [runs["large"], runs["sparse"]]]
    of_four = results.contrast(*arms, ["test_styles"])
    squares = [values[arm].var(ddof=1) / 3 for arm in ("sparser", "small", "large", "sparse")]
    freedom = sum(squares) ** 2 / sum(square**2 / 2 for square in squares)
    assert of_four.half_width == pytest.approx(0.75 * stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares)))
    mean = 0.75 * (values["sparser"] + values["small"] - values["large"] - values["sparse"]).mean()
    assert of_four.mean == pytest.approx(mean)

    rows = tables.beside_line(
        {"small": "dense", "sparse": "experts", "sparse and best": "best", "none": "no runs"},
        list(values)[:3],
        ["test_styles"],
    )
    assert [row[0] for row in rows] == ["dense", "experts", "best"] and rows[0][8:] == ["", ""]
    assert rows[2][9] == "> 1.40"  # in one seed the line ends, at 1.60, with less than the arm has: its end counts
    assert rows[1][8] == str(results.lead_over_line([runs["sparse"]], line, ["test_styles"]))


def test_hypotheses_are_decided_together_and_one_without_all_its_runs_is_not_tested():
    assert results.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert results.holm([0.5, 0.02, 0.6]) == pytest.approx([1, 0.06, 1])
    above, below = results.Lead(0.1, 0.05, 5, p=0.001), results.Lead(-0.1, 0.05, 5, p=0.016)
    few, weak = results.Lead(0.1, 0.01, 3, p=0.0001), results.Lead(0.1, 0.09, 5, p=0.04)

    def verdicts(*leads, parts=()):
        return [row[-1] for row in decided([Hypothesis("h", lead, 5, parts) for lead in leads])]

    assert verdicts(above, below, few) == ["holds", "does not hold", "not tested"]
    assert verdicts(above, weak, None) == ["holds", "open", "not tested"]
    assert verdicts(above, parts=[above, below]) == ["does not hold"]
    assert verdicts(below._replace(margin=0.2), below._replace(margin=0.05)) == ["holds", "does not hold"]
