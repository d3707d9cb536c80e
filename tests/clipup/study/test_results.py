"""What is read out of logs: chosen learning rates, costs along a chain of runs, spread and paired differences."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from clipup.study import log, measure, results


def records(name, arm="clip_up", lr=0.1, seed=0, start=None, score=0.5, gflops=10.0, hits=None):
    hits = torch.zeros(8, dtype=torch.bool) if hits is None else torch.tensor(hits)
    way = {"r1": score, "r5": score, "nll": 1.0, "hits": measure.pack(hits)}
    split = {"gallery": 8, "captions": 8, "t2i": way, "i2t": way}
    config = {"name": name, "arm": arm, "model": "m", "steps": 5, "lr": lr, "seed": seed, "start": start}
    return [
        {"kind": "run", **config},
        {"kind": "train", "step": 5, "lr": 0.0, "loss": 1.0},
        {"kind": "test", "test_styles": split, "test_names": split, "validation": split},
        {"kind": "cost", "train_gflops": gflops, "seconds": 1.0, "machine": {}},
    ]


@pytest.fixture
def write(tmp_path):
    def write(*logs):
        for one in logs:
            log.write(tmp_path / f"{one[0]['name']}.jsonl", one)
        return results.read(tmp_path)

    return write


def test_an_arm_takes_the_rate_that_is_best_on_validation_over_the_seeds_that_all_rates_have(write):
    found = write(
        records("a", lr=0.1, seed=0, score=0.50),
        records("b", lr=0.2, seed=0, score=0.52),
        records("c", lr=0.2, seed=1, score=0.10),  # a bad seed that the other rate was not run with
        records("d", arm="dense", lr=0.1, score=0.9),
    )

    best = results.chosen(found.values())

    assert [one.name for one in best["clip_up", "m", 5]] == ["b", "c"]
    assert [one.name for one in best["dense", "m", 5]] == ["d"]


def test_rates_without_a_common_seed_cannot_be_compared(write):
    found = write(records("a", lr=0.1, seed=0), records("b", lr=0.2, seed=1))

    with pytest.raises(ValueError, match="no seed in common"):
        results.chosen(found.values())


def test_the_cost_of_a_run_includes_the_runs_that_it_goes_on_from(write):
    found = write(
        records("base", gflops=10.0),
        records("middle", start="base", gflops=5.0),
        records("top", start="middle", gflops=2.0),
    )

    assert results.total_gflops(found["top"], found) == 17.0


def test_a_paired_difference_and_its_interval_are_those_of_the_queries(write):
    ours = [True, True, True, False, True, False, True, True]
    theirs = [True, False, False, False, True, True, True, False]
    found = write(records("a", hits=ours), records("b", hits=theirs))

    difference, half_width = results.paired_difference(found["a"], found["b"], "test_styles", "t2i")

    differences = numpy.array(ours, float) - numpy.array(theirs, float)
    assert difference == pytest.approx(2 / 8)
    assert half_width == pytest.approx(1.96 * numpy.std(differences, ddof=1) / math.sqrt(8))


def test_one_run_has_no_spread():
    assert results.mean_and_spread([2.0]) == (2.0, None)
    assert results.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))


def test_a_log_that_breaks_off_is_refused(tmp_path):
    log.write(tmp_path / "a.jsonl", records("a")[:-1])

    with pytest.raises(ValueError, match=r"a\.jsonl is no whole log of a run"):
        results.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no log"):
        results.read(tmp_path / "nowhere")
