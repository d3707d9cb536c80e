"""Results from the logs of a study: selection of learning rates, and leads between arms with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from clipup.evaluate.retrieval import WAYS

from . import log, measure

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


_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""0.975 quantiles of Student's t with 1 to 19 degrees of freedom."""
_NATS = ("nll", "best_nll", "loss")
"""Measures in nats: less is better."""


class Lead(NamedTuple):
    """Mean difference of two arms in R@1 or R@5 (a fraction of 1), or in NLL or training loss (nats)."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval of the mean; None for one seed."""
    seeds: int
    measure: str = "R@1"

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


def lead_unpaired(
    ours: Sequence[Result], theirs: Sequence[Result], splits: Sequence[str] = TESTS, measure: str = "R@1"
) -> Lead | None:
    """The lead of an arm over another one whose runs share nothing with its own but the number of their seed. The
    interval is Welch's, with the degrees of freedom rounded down. None if either has fewer than two runs."""
    arms = [[run.mean(measure, splits) for run in runs] for runs in (ours, theirs)]
    if min(map(len, arms)) < 2:
        return None
    squares = [stdev(values) ** 2 / len(values) for values in arms]  # of the standard errors
    parts = (square**2 / (len(values) - 1) for square, values in zip(squares, arms, strict=True))
    freedom = int(sum(squares) ** 2 / sum(parts))
    half = _T_95[freedom - 1] * math.sqrt(sum(squares))
    return Lead(fmean(arms[0]) - fmean(arms[1]), half, min(map(len, arms)), measure)


def lead_over_chord(
    ours: Iterable[Result], ends: Sequence[Iterable[Result]], scale: Callable[[float], float]
) -> Lead | None:
    """The lead in R@1 of an arm over the straight line through two others, over the FLOPs of a pair in inference. None
    without a shared seed.

    Args:
        scale: of the axis, such as ``math.log``.
    """
    differences = []
    for our, *others in zip(*shared(ours, *ends), strict=True):
        x, left, right = (scale(run.cost["gflops_per_pair"]) for run in (our, *others))
        low, high = (run.mean("R@1") for run in others)
        differences.append(our.mean("R@1") - low - (high - low) * (x - left) / (right - left))
    return _over_seeds(differences)


def _over_seeds(differences: Sequence[float], measure: str = "R@1") -> Lead | None:
    return Lead(fmean(differences), half_width(differences), len(differences), measure) if differences else None


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of one value per seed, by Student's t; None for one seed."""
    count = len(values)
    return _T_95[count - 2] * stdev(values) / math.sqrt(count) if count > 1 else None


def lead_over_captions(our: Result, their: Result, split: str) -> Lead:
    """The lead in R@1 of texts to images of one run over another on the same captions, whose interval is normal."""
    way, count = WAYS[0], our.test[split]["captions"]
    hits = [measure.unpack(run.test[split][f"{way}_hits"], count).astype(float) for run in (our, their)]
    differences = hits[0] - hits[1]
    return Lead(float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / math.sqrt(count), 1)
