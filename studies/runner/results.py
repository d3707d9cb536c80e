"""Results from the logs of a study: selection of learning rates, and differences between runs with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    """One log. ``config`` is the run's, ``test`` is by split, ``layers`` is empty for a dense model."""

    config: dict[str, Any]
    training: list[log.Record]
    validations: list[log.Record]
    test: dict[str, dict[str, Any]]
    layers: dict[str, dict[str, float]]
    cost: log.Record

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def budget(self) -> int:
        """Steps of the CLIP-UP run whose budget this run has."""
        return self.config.get("budget") or self.config["steps"]

    @property
    def selection(self) -> float:
        """The criterion for learning rates: mean R@1 of both directions on validation, at the end."""
        return self.mean("R@1", ["validation"])

    def mean(self, measure: str, splits: Sequence[str] = TESTS, ways: Sequence[str] = WAYS) -> float:
        """``R@1``, ``R@5`` or ``nll`` at the end, mean over splits and directions."""
        return fmean(self.test[split][f"{way}_{measure}"] for split in splits for way in ways)

    @property
    def similarity(self) -> float | None:
        return fmean(layer["similarity"] for layer in self.layers.values()) if self.layers else None


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
    return Result(config, of_kind["train"], of_kind.get("validation", []), test, layers, cost)


def group_of(result: Result) -> Group:
    """The group of a run."""
    return Group(result.config["model"], result.budget, result.config["arm"])


def by_rate(results: Iterable[Result]) -> dict[Group, dict[float, dict[int, Result]]]:
    """The runs of each group by learning rate and seed.

    Raises:
        ValueError: two runs differ in none of these.
    """
    groups: dict[Group, dict[float, dict[int, Result]]] = {}
    for result in results:
        of_seed = groups.setdefault(group_of(result), {}).setdefault(result.config["lr"], {})
        other = of_seed.setdefault(result.config["seed"], result)
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
    best = {}
    for group, rates in by_rate(results).items():
        seeds = rates[_best_rate(group, rates)]
        best[group] = [seeds[seed] for seed in sorted(seeds)]
    return best


def _best_rate(group: Group, by_rate: dict[float, dict[int, Result]]) -> float:
    def beats(rate: float, other: float) -> bool:
        common = by_rate[rate].keys() & by_rate[other].keys()
        if not common:
            raise ValueError(
                f"learning rates {rate:g} and {other:g} of {tuple(group)} have no seed in common, so none can be chosen"
            )
        mean, mean_of_other = (fmean(by_rate[one][seed].selection for seed in sorted(common)) for one in (rate, other))
        return mean > mean_of_other

    def strength(rate: float) -> tuple[int, int]:
        return sum(beats(rate, other) for other in by_rate if other != rate), len(by_rate[rate])

    return max(sorted(by_rate), key=strength)


def before(result: Result, results: dict[str, Result]) -> list[Result]:
    """The run that a run starts from, the one that this starts from, and so on.

    Raises:
        KeyError: one of them has no log.
    """
    name = result.config["start"]
    return [] if name is None else [results[name], *before(results[name], results)]


def start_steps(result: Result, results: dict[str, Result]) -> int | None:
    """The steps of the run that a run starts from."""
    return next((start.config["steps"] for start in before(result, results)), None)


def of_start(results: dict[str, Result], steps: int) -> dict[str, Result]:
    """The runs from starts of so many steps, and all that those start from in turn."""
    found = [result for result in results.values() if start_steps(result, results) == steps]
    starts = [start for result in found for start in before(result, results)]
    return {result.name: result for result in (*starts, *found)}


def total_gflops(result: Result, results: dict[str, Result]) -> float:
    """Training FLOPs of a run and of all runs that it starts from, in 10^9."""
    return sum(one.cost["train_gflops"] for one in (result, *before(result, results)))


def paired_difference(a: Result, b: Result, split: str, way: str) -> tuple[float, float]:
    """R@1 of ``a`` minus that of ``b`` on the same queries, and half the width of its 95 % interval (normal)."""
    count = a.test[split]["captions" if way == "text_to_image" else "gallery"]
    hits = [measure.unpack(one.test[split][f"{way}_hits"], count).astype(float) for one in (a, b)]
    differences = hits[0] - hits[1]
    return float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / math.sqrt(count)


_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""0.975 quantiles of Student's t with 1 to 19 degrees of freedom."""


class Lead(NamedTuple):
    """Mean difference over seeds of two arms' R@1 (a fraction of 1) or NLL (nats)."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval of the mean over seeds (Student's t); None for one seed."""
    seeds: int

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def lead(
    pairs: Sequence[tuple[Result, Result]],
    splits: Sequence[str] = TESTS,
    ways: Sequence[str] = WAYS,
    measure: str = "R@1",
) -> Lead:
    """The lead of the first of each pair over the second, one pair per seed; mean over splits and directions."""
    differences = [ours.mean(measure, splits, ways) - theirs.mean(measure, splits, ways) for ours, theirs in pairs]
    count = len(differences)
    half = _T_95[count - 2] * stdev(differences) / math.sqrt(count) if count > 1 else None
    return Lead(fmean(differences), half, count)
