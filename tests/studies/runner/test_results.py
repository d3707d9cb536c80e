"""What is read out of logs: chosen learning rates, costs along a chain of runs, spread and paired differences."""

from __future__ import annotations

import math

import numpy
import pytest

from studies.runner import log, results


def test_an_arm_takes_the_rate_that_is_best_on_validation_over_the_seeds_that_all_rates_have(write, make_records):
    found = write(
        make_records("a", lr=0.1, seed=0, score=0.50),
        make_records("b", lr=0.2, seed=0, score=0.52),
        make_records("c", lr=0.2, seed=1, score=0.10),  # a bad seed that the other rate was not run with
        make_records("d", arm="dense", lr=0.1, score=0.9),
    )

    best = results.chosen(found.values())

    assert [one.name for one in best["m", 5, "clip_up"]] == ["b", "c"]
    assert [one.name for one in best["m", 5, "dense"]] == ["d"]


def test_rates_are_chosen_by_validation_and_not_by_the_test_splits(write, make_records):
    found = write(
        make_records("a", lr=0.1, score=0.9, validation=0.50),
        make_records("b", lr=0.2, score=0.1, validation=0.52),
    )

    assert [one.name for one in results.chosen(found.values())["m", 5, "clip_up"]] == ["b"]


def test_rates_with_the_most_seeds_are_compared_over_all_of_them(write, make_records):
    """A rate that was dropped after one seed does not keep the others from being told apart by theirs."""
    scores = {0.1: (0.40,), 0.2: (0.50, 0.60, 0.70), 0.4: (0.52, 0.55, 0.56)}
    found = write(
        *(
            make_records(f"{lr}-{seed}", lr=lr, seed=seed, score=score)
            for lr, of_rate in scores.items()
            for seed, score in enumerate(of_rate)
        )
    )

    assert [one.name for one in results.chosen(found.values())["m", 5, "clip_up"]] == ["0.2-0", "0.2-1", "0.2-2"]


def test_a_rate_with_few_seeds_that_is_ahead_is_not_dropped(write, make_records):
    found = write(
        make_records("a", lr=0.1, seed=0, score=0.60),
        *(make_records(f"b{seed}", lr=0.2, seed=seed, score=score) for seed, score in enumerate((0.5, 0.7))),
        *(make_records(f"c{seed}", lr=0.4, seed=seed, score=score) for seed, score in enumerate((0.4, 0.9))),
    )

    assert [one.name for one in results.chosen(found.values())["m", 5, "clip_up"]] == ["a"]


def test_seeds_that_one_rate_alone_has_change_no_choice(write, make_records):
    found = write(
        make_records("a0", lr=0.1, seed=0, score=0.50),
        make_records("b0", lr=0.2, seed=0, score=0.52),  # wins by the one seed that all rates have
        make_records("a1", lr=0.1, seed=1, score=0.60),
        make_records("b1", lr=0.2, seed=1, score=0.55),  # and loses by the two that these have
        make_records("a2", lr=0.1, seed=2, score=0.10),
        make_records("c0", lr=0.4, seed=0, score=0.20),
    )

    assert [one.name for one in results.chosen(found.values())["m", 5, "clip_up"]] == ["a0", "a1", "a2"]


def test_of_rates_that_beat_each_other_in_a_circle_the_one_with_the_most_seeds_is_taken(write, make_records):
    scores = {(0.1, 0): 0.6, (0.2, 0): 0.5, (0.2, 1): 0.6, (0.4, 1): 0.5, (0.4, 2): 0.6, (0.1, 2): 0.5, (0.4, 3): 0.1}
    found = write(*(make_records(f"{lr}-{seed}", lr=lr, seed=seed, score=s) for (lr, seed), s in scores.items()))

    assert [one.name for one in results.chosen(found.values())["m", 5, "clip_up"]] == ["0.4-1", "0.4-2", "0.4-3"]


def test_rates_without_a_common_seed_cannot_be_compared(write, make_records):
    found = write(make_records("a", lr=0.1, seed=0), make_records("b", lr=0.2, seed=1))

    with pytest.raises(ValueError, match="no seed in common"):
        results.chosen(found.values())


def test_the_cost_of_a_run_includes_the_runs_that_it_goes_on_from(write, make_records):
    found = write(
        make_records("base", gflops=10.0),
        make_records("middle", start="base", gflops=5.0),
        make_records("top", start="middle", gflops=2.0),
    )

    assert results.total_gflops(found["top"], found) == 17.0


def test_a_paired_difference_and_its_interval_are_those_of_the_queries(write, make_records):
    ours = [True, True, True, False, True, False, True, True]
    theirs = [True, False, False, False, True, True, True, False]
    found = write(make_records("a", hits=ours), make_records("b", hits=theirs))

    difference, half_width = results.paired_difference(found["a"], found["b"], "test_styles", "text_to_image")

    differences = numpy.array(ours, float) - numpy.array(theirs, float)
    assert difference == pytest.approx(2 / 8)
    assert half_width == pytest.approx(1.96 * numpy.std(differences, ddof=1) / math.sqrt(8))


def test_runs_with_another_ones_budget_stand_beside_it(write, make_records):
    found = write(make_records("a", "clip_up", budget=3), make_records("b", "dense_equal_flops"))

    assert results.group_of(found["a"]) == ("m", 3, "clip_up")
    assert results.group_of(found["b"]) == ("m", 5, "dense_equal_flops")


def test_a_lead_over_seeds_is_a_mean_with_students_interval(write, make_records):
    scores = [(0.52, 0.50), (0.53, 0.50), (0.57, 0.50)]
    pairs = []
    for seed, (ours, theirs) in enumerate(scores):
        found = write(
            make_records(f"a{seed}", seed=seed, score=ours), make_records(f"b{seed}", "dense", seed=seed, score=theirs)
        )
        pairs.append((found[f"a{seed}"], found[f"b{seed}"]))

    lead = results.lead(pairs, ["test_styles"], ["text_to_image"])

    differences = numpy.array([0.02, 0.03, 0.07])
    assert lead.mean == pytest.approx(0.04) and lead.seeds == 3
    expected = 4.302653 * differences.std(ddof=1) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert lead.half_width == pytest.approx(expected, rel=1e-3) and not lead.sure
    assert results.lead(pairs[:1], ["test_styles"], ["text_to_image"]) == (pytest.approx(0.02), None, 1)
    assert lead._replace(half_width=0.039).sure and not results.lead(pairs[:1]).sure
    every = results.lead(pairs)  # a half of it from images to texts, a fifth of both on names
    assert every.mean == pytest.approx(0.04 * (1 + 0.5 + 0.2 + 0.1) / 4)
    assert results.lead(pairs, ["test_names"], ["image_to_text"], "nll").mean == pytest.approx(-0.04 * 0.1)


def test_one_run_has_no_spread():
    assert results.mean_and_spread([2.0]) == (2.0, None)
    assert results.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))


def test_a_log_that_breaks_off_is_refused(tmp_path, make_records):
    log.write(tmp_path / "a.jsonl", make_records("a")[:-1])

    with pytest.raises(ValueError, match=r"a\.jsonl is not a complete log"):
        results.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no log"):
        results.read(tmp_path / "nowhere")


def test_steps_that_were_not_applied_are_left_out_of_a_logs_means():
    records = [{"step": step, "lr": 0.1, "loss": loss} for step, loss in ((1, 2.0), (2, None), (3, 4.0))]
    lines = list(log.training(records, steps=150))
    assert [line["loss"] for line in lines] == [3.0]
    assert [line["loss"] for line in log.training(records[1:2], steps=150)] == [None]
