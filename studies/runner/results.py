"""Results from the logs of a study: selection of learning rates, and leads between arms with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy
from scipy import stats

from clipup.evaluate.retrieval import WAYS

from . import log

TESTS = ("test_styles", "test_names")


class Group(NamedTuple):
    """Runs that differ only in learning rate and seed; groups sort in the order of the page."""

    model: str
    budget: int
    arm: str


@dataclass(frozen=True)
class Result:
    """One log. ``config`` is the run's, ``loss`` the contrastive one over the last window of training, ``test`` is by
    split, ``layers`` is empty for a dense model."""

    config: dict[str, Any]
    loss: float
    validations: list[log.Record]
    test: dict[str, dict[str, Any]]
    layers: dict[str, dict[str, float]]
    cost: log.Record

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def arm(self) -> str:
        return self.config["arm"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def group(self) -> Group:
        """Its budget is the steps of the CLIP-UP run whose FLOPs or seconds this run matches."""
        config = self.config
        return Group(config["model"], config.get("budget") or config["steps"], config["arm"])

    @property
    def selection(self) -> float:
        """The criterion for learning rates: mean R@1 of both directions on validation, at the end."""
        return self.mean("R@1", ["validation"])

    def mean(self, measure: str, splits: Sequence[str] = TESTS, ways: Sequence[str] = WAYS) -> float:
        """``R@1``, ``R@5``, ``nll`` or ``best_nll`` at the end, mean over splits and directions; or the training
        ``loss``."""
        if measure == "loss":
            return self.loss
        return fmean(self.test[split][f"{way}_{measure}"] for split in splits for way in ways)


def read(directory: str | Path) -> dict[str, Result]:
    """All logs of a directory by run name.

    Raises:
        FileNotFoundError, ValueError: there is none, or one is invalid.
    """
    paths = sorted(Path(directory).glob(f"*{log.SUFFIX}"))
    if not paths:
        raise FileNotFoundError(f"there is no log (*{log.SUFFIX}) in {directory}: run the study first")
    results = [_result(log.read(path)) for path in paths]
    return {result.name: result for result in results}


def _result(records: Sequence[log.Record]) -> Result:
    of_kind: dict[str, list[log.Record]] = {}
    for record in records:
        of_kind.setdefault(record["kind"], []).append({key: record[key] for key in record if key != "kind"})
    (config,), (test,), (cost,) = of_kind["run"], of_kind["test"], of_kind["cost"]
    layers = of_kind.get("layers", [{"layers": {}}])[0]["layers"]
    return Result(config, of_kind["train"][-1]["contrastive"], of_kind.get("validation", []), test, layers, cost)


def by_rate(results: Iterable[Result]) -> dict[Group, dict[float, dict[int, Result]]]:
    """The runs of each group by learning rate and seed.

    Raises:
        ValueError: two runs differ in none of these.
    """
    groups: dict[Group, dict[float, dict[int, Result]]] = {}
    for result in results:
        of_seed = groups.setdefault(result.group, {}).setdefault(result.config["lr"], {})
        other = of_seed.setdefault(result.seed, result)
        if other is not result:
            raise ValueError(f"{other.name} and {result.name} are of one arm, budget, learning rate and seed")
    return groups


def chosen(results: Iterable[Result]) -> dict[Group, list[Result]]:
    """The runs of each group at the learning rate that is best on validation, ordered by seed.

    That is the rate that beats every other one in pairwise comparisons over the seeds that both have, so a rate cannot
    win by a seed that the other lacks. If none does, it is the one with the most wins, then with the most seeds.

    Raises:
        ValueError: two rates have no seed in common.
    """
    groups = by_rate(results)
    return {group: shared(rates[_best_rate(group, rates)].values())[0] for group, rates in groups.items()}


def _best_rate(group: Group, by_rate: dict[float, dict[int, Result]]) -> float:
    def beats(rate: float, other: float) -> bool:
        ours, theirs = shared(by_rate[rate].values(), by_rate[other].values())
        if not ours:
            raise ValueError(
                f"learning rates {rate:g} and {other:g} of {tuple(group)} have no seed in common, so none can be chosen"
            )
        return fmean(run.selection for run in ours) > fmean(run.selection for run in theirs)

    def strength(rate: float) -> tuple[int, int]:
        return sum(beats(rate, other) for other in by_rate if other != rate), len(by_rate[rate])

    return max(sorted(by_rate), key=strength)


def shared(*arms: Iterable[Result]) -> list[list[Result]]:
    """The runs of each arm with the seeds that all arms have, ordered by seed."""
    of_seed = [{run.seed: run for run in runs} for runs in arms]
    seeds = sorted(set.intersection(*map(set, of_seed)))
    return [[runs[seed] for seed in seeds] for runs in of_seed]


_NATS = ("nll", "best_nll", "loss")
"""Measures in nats: less is better."""


class Lead(NamedTuple):
    """Mean difference of two arms in R@1 or R@5 (a fraction of 1), or in NLL or training loss (nats)."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval of the mean; None for one seed."""
    seeds: int
    measure: str = "R@1"
    p: float | None = None
    """Of a mean of -``margin``, two-sided; None without an interval."""
    margin: float = 0.0
    """How far the first arm may be behind and still count as good."""

    def __str__(self) -> str:
        """In points or nats, with the interval. If that excludes 0: bold if the first arm is better, italic if the
        other one is."""
        scale, decimals = (1, 3) if self.measure in _NATS else (100, 2)
        text = f"{scale * self.mean:+.{decimals}f}"
        if self.half_width is None:
            return text
        text += f" ± {scale * self.half_width:.{decimals}f}"
        mark = "**" if (self.mean > 0) != (self.measure in _NATS) else "*"
        return f"{mark}{text}{mark}" if abs(self.mean) > self.half_width else text


class Saved(NamedTuple):
    """FLOPs of a line over an arm's."""

    ratios: list[float]
    """By seed; none if the line falls in a seed, so that it may have an R@1 twice."""
    bound: str
    """">" if the line ends lower than the arm in a seed, so that its end counts there; "<" if it begins higher; "<>" if
    both."""


def lead(
    ours: Iterable[Result],
    theirs: Iterable[Result],
    splits: Sequence[str] = TESTS,
    ways: Sequence[str] = WAYS,
    measure: str = "R@1",
) -> Lead | None:
    """The lead of an arm over another one, mean over splits, directions and shared seeds, whose interval is Student's.
    None without a shared seed."""
    pairs = zip(*shared(ours, theirs), strict=True)
    return _over_seeds(
        [our.mean(measure, splits, ways) - their.mean(measure, splits, ways) for our, their in pairs], measure
    )


def contrast(
    plus: Sequence[Sequence[Result]],
    minus: Sequence[Sequence[Result]],
    splits: Sequence[str] = TESTS,
    measure: str = "R@1",
    margin: float = 0.0,
) -> Lead | None:
    """The sum of the means of some arms minus that of others, whose runs share nothing but the numbers of their seeds.
    Interval and p, which tests a mean of -``margin``, are Welch's. None if an arm has fewer than two runs."""
    arms = [[run.mean(measure, splits) for run in runs] for runs in (*plus, *minus)]
    if min(map(len, arms)) < 2:
        return None
    means = [fmean(values) for values in arms]
    squares = [stdev(values) ** 2 / len(values) for values in arms]  # of the standard errors
    parts = (square**2 / (len(values) - 1) for square, values in zip(squares, arms, strict=True))
    difference = sum(means[: len(plus)]) - sum(means[len(plus) :])
    return _tested(difference, sum(squares), sum(squares) ** 2 / sum(parts), min(map(len, arms)), measure, margin)


def lead_over_line(
    arms: Sequence[Iterable[Result]],
    line: Sequence[Iterable[Result]],
    splits: Sequence[str] = TESTS,
) -> Lead | None:
    """The lead in R@1, mean over the arms, over others at the same FLOPs of a pair in inference. Between these, in
    ascending FLOPs, the line is straight over the logarithm. None without a shared seed."""
    differences = []
    for ours, others in _by_seed(arms, line):
        x, y = zip(*((_log_flops(run), run.mean("R@1", splits)) for run in others), strict=True)
        leads = (run.mean("R@1", splits) - numpy.interp(_log_flops(run), x, y) for run in ours)
        differences.append(float(fmean(leads)))
    return _over_seeds(differences)


def flops_saved(ours: Iterable[Result], line: Sequence[Iterable[Result]], splits: Sequence[str]) -> Saved:
    """How many times an arm's FLOPs the line of ``lead_over_line`` has where it has the arm's R@1."""
    ratios, bounds = [], ""
    for (run,), others in _by_seed([ours], line):
        x, y = zip(*((_log_flops(other), other.mean("R@1", splits)) for other in others), strict=True)
        if list(y) != sorted(y):
            return Saved([], "")
        recall = run.mean("R@1", splits)
        bounds += ">" if recall > y[-1] else "<" if recall < y[0] else ""
        ratios.append(float(numpy.exp(numpy.interp(recall, y, x) - _log_flops(run))))
    return Saved(ratios, "".join(sorted(set(bounds))))


def _by_seed(
    arms: Sequence[Iterable[Result]], others: Sequence[Iterable[Result]]
) -> list[tuple[tuple[Result, ...], tuple[Result, ...]]]:
    """For each seed that all have, the runs of the arms and those of the others."""
    return [(runs[: len(arms)], runs[len(arms) :]) for runs in zip(*shared(*arms, *others), strict=True)]


def _log_flops(run: Result) -> float:
    return math.log(run.cost["gflops_per_pair"])


def _over_seeds(differences: Sequence[float], measure: str = "R@1") -> Lead | None:
    """The mean of one difference per seed, whose interval and p are Student's; None without a seed."""
    count = len(differences)
    if count < 2:
        return Lead(differences[0], None, count, measure) if differences else None
    return _tested(fmean(differences), stdev(differences) ** 2 / count, count - 1, count, measure)


def _tested(mean: float, square: float, freedom: float, seeds: int, measure: str, margin: float = 0.0) -> Lead:
    """A lead from its mean, the square of its standard error, and the degrees of freedom of Student's t."""
    error, student = math.sqrt(square), stats.t(freedom)
    p = 2 * student.sf(abs(mean + margin) / error) if error else 0.0
    return Lead(mean, float(student.ppf(0.975) * error), seeds, measure, float(p), margin)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of one value per seed, by Student's t; None for one seed."""
    return None if len(values) < 2 else _over_seeds(values).half_width


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected for their number by Holm's method."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, test in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[test]))
        corrected[test] = highest
    return corrected
