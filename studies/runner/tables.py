"""Tables of a study's results: a head and rows of cells, for the page or for CSV files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from itertools import product
from statistics import fmean, stdev
from typing import NamedTuple

from clipup.evaluate.retrieval import WAYS
from clipup.inspection.figures.format import MISSING, percent

from . import results
from .results import TESTS, Group, Lead, Result

Table = list[list[str]]
"""The head and the rows."""


class Tables:
    """Tables with rows ordered by budget and arm. A group holds the runs of one arm and budget, at its chosen rate."""

    def __init__(self, runs: dict[str, Result]) -> None:
        self.results = dict(sorted(runs.items()))

    @cached_property
    def groups(self) -> list[tuple[Group, list[Result]]]:
        return sorted(results.chosen(self.results.values()).items())

    def shortest(self, arm: str) -> list[Result]:
        """The runs of an arm at its smallest budget; none without such an arm."""
        groups = [(group.budget, runs) for group, runs in self.groups if group.arm == arm]
        return min(groups, key=lambda group: group[0], default=(0, []))[1]

    def before(self, run: Result) -> list[Result]:
        """The run that a run starts from, the one that this starts from, and so on.

        Raises:
            KeyError: one of them has no log.
        """
        name = run.config["start"]
        return [] if name is None else [self.results[name], *self.before(self.results[name])]

    def starts_of(self, runs: Sequence[Result]) -> list[Result]:
        """What the runs start from, for those that start from another run."""
        return [start for run in runs for start in self.before(run)[:1]]

    def pflop(self, run: Result) -> float:
        """Training FLOPs of a run and of all runs that it starts from, in 10^15."""
        return sum(part.cost["train_gflops"] for part in (run, *self.before(run))) / 1e6

    def of_start(self, steps: int) -> Tables:
        """The tables of the runs from starts of so many steps, and all that those start from in turn."""
        runs = [run for run in self.results.values() if [s.config["steps"] for s in self.starts_of([run])] == [steps]]
        return Tables({run.name: run for of in runs for run in (of, *self.before(of))})

    def of_seeds(self, seeds: Collection[int]) -> Tables:
        """The tables of the runs with these seeds."""
        return Tables({name: run for name, run in self.results.items() if run.seed in seeds})

    def with_runs_of(self, other: Tables) -> Tables:
        """The tables of these runs and another study's."""
        return Tables(self.results | other.results)

    def data(self) -> dict:
        """The description of the data in the logs, which must be the same in all of them."""
        seen = {run.config["data"]["fingerprint"]: run.config["data"] for run in self.results.values()}
        if len(seen) > 1:
            raise ValueError(f"the logs are of {len(seen)} different data sets: run the study on one")
        (data,) = seen.values()
        return data

    def galleries(self) -> dict[str, dict[str, int]]:
        """The number of ``images`` and distinct ``captions`` by split."""
        test = next(iter(self.results.values())).test
        return {split: {"images": of["gallery"], "captions": of["captions"]} for split, of in test.items()}

    def retrieval(self) -> Table:
        """Recall and negative log-likelihood of every group on every test split, at its chosen learning rate."""
        tests = [split for split in self.galleries() if split.startswith("test_")]
        written = {"R@1": percent, "R@5": percent, "nll": "{:.3f}".format}
        rows = []
        for split, (_, runs) in product(tests, self.groups):
            cells = (
                _spread([run.test[split][f"{way}_{name}"] for run in runs], written[name])
                for way, name in product(WAYS, written)
            )
            rows.append([split, *_about(runs), f"{self.pflop(runs[0]):.3f}", *cells])
        measures = [f"{way}_{name}" for way, name in product(WAYS, ("R@1 %", "R@5 %", "NLL"))]
        return [["split", "arm", "steps", "lr", "seeds", "PFLOP", *measures], *rows]

    def lead(self, arm: str, other: str, splits: Sequence[str] = TESTS, measure: str = "R@1") -> str:
        """The lead of an arm over another one, each at its smallest budget, over the seeds of both, for a sentence.

        Args:
            measure: ``R@1`` or ``R@5``, in points, or ``nll`` or the training ``loss``, in nats.
        """
        return str(results.lead(self.shortest(arm), self.shortest(other), splits, measure=measure) or MISSING)

    def lead_over_start(self, arm: str) -> str:
        """The lead of an arm over its starts, at its smallest budget, for a sentence."""
        return str(results.lead(self.shortest(arm), self.starts_of(self.shortest(arm))))

    def leads(self, arm: str, splits: Sequence[str] = TESTS) -> Table:
        """The leads over every other arm of the same budget, in R@1: by split and direction, and their mean. The last
        column is the mean in NLL."""
        rows = []
        for group, ours, theirs in self._rivals(arm):
            leads = [results.lead(ours, theirs, [split], [way]) for split, way in product(splits, WAYS)]
            leads += [results.lead(ours, theirs, splits, measure=measure) for measure in ("R@1", "nll")]
            rows.append([label(group.arm), str(group.budget), str(leads[0].seeds), *map(str, leads)])
        ways = [_way(split, way) for split, way in product(splits, WAYS)]
        return [["minus", f"steps of {label(arm)}", "seeds", *ways, "mean", "NLL"], *rows]

    def comparisons(self, arm: str, others: dict[str, str]) -> Table:
        """An arm beside others of the same budget, by budget and then in the order of ``others``, without a head: the
        wording of the comparison, the steps of the arm, seeds, R@1 of the other and of the arm over these, and the lead
        in R@1 and in NLL.

        Args:
            others: the other arms, with the wording of the comparison, such as "at equal steps" for
                ``dense_continued``.
        """
        rows, order = [], list(others)
        rivals = [rival for rival in self._rivals(arm) if rival[0].arm in others]
        for group, ours, theirs in sorted(rivals, key=lambda rival: (rival[0].budget, order.index(rival[0].arm))):
            ours, theirs = results.shared(ours, theirs)
            leads = [str(results.lead(ours, theirs, measure=measure)) for measure in ("R@1", "nll")]
            recalls = _recall(theirs), _recall(ours)
            rows.append([others[group.arm], f"{group.budget:,}", str(len(ours)), *recalls, *leads])
        return rows

    def beside_line(self, arms: dict[str, str], line: Sequence[str], splits: Sequence[str]) -> Table:
        """Arms beside the line of dense ones in R@1 over the logarithm of inference FLOPs, without a head: the wording
        of the arm, MFLOP of a pair in inference, thousands of parameters, seeds, R@1 on validation and in the splits,
        NLL at the best temperature, training loss, and of sparse arms the lead over the line and how many times the
        arm's FLOPs the line has at the arm's R@1.

        Args:
            arms: those that have runs are in the table, with their wording.
            line: in ascending FLOPs.
        """
        rows, ends = [], [self.shortest(arm) for arm in line]
        for arm, words in arms.items():
            if not (runs := self.shortest(arm)):
                continue
            cost, beside = runs[0].cost, runs[0].layers and all(ends)
            spreads = [
                _interval([(100 if measure == "R@1" else 1) * run.mean(measure, over) for run in runs])
                for over, measure in ((["validation"], "R@1"), (splits, "R@1"), (splits, "best_nll"), (splits, "loss"))
            ]
            times = _times(results.flops_saved(runs, ends, splits)) if beside else ""
            costs = f"{1000 * cost['gflops_per_pair']:.2f}", f"{cost['params'] / 1e3:.0f}", str(len(runs))
            lead = str(results.lead_over_line([runs], ends, splits) or MISSING) if beside else ""
            rows.append([words, *costs, *spreads, lead, times])
        return rows

    def leads_by_rate(self, arm: str, others: Sequence[str], splits: Sequence[str] = TESTS) -> Table:
        """The lead of an arm over others at the same learning rate and the arm's smallest budget, in R@1 and NLL, with
        the number of seeds."""
        budget = self.shortest(arm)[0].group.budget
        groups = results.by_rate(self.results.values()).items()
        rates = {group.arm: of_rate for group, of_rate in groups if group.budget == budget}
        rows = []
        for rate, ours in sorted(rates[arm].items()):
            theirs = [rates.get(other, {}).get(rate, {}) for other in others]
            cells = (cell for runs in theirs for cell in _lead_cells(ours.values(), runs.values(), splits))
            rows.append([f"{rate:g}", *cells])
        heads = [head for other in others for head in (f"minus {label(other)}", "NLL", "seeds")]
        return [["learning rate of both", *heads], *rows]

    def leads_over_larger(self, larger: Tables, rivals: Sequence[str], splits: Sequence[str] = TESTS) -> Table:
        """Every arm beside arms of a larger dense model, ``rivals``: the FLOPs of a pair in inference, also as a share
        of the larger model's; those of training, the start's included; R@1, mean over splits and directions; and the
        leads over the rivals, in R@1 and NLL, whose seeds are not paired."""
        of_larger = larger.shortest(rivals[0])[0].cost["gflops_per_pair"]
        rows = []
        for _, runs in self.groups:
            gflops = runs[0].cost["gflops_per_pair"]
            costs = f"{gflops:.4f}", percent(gflops / of_larger, 0), f"{self.pflop(runs[0]):.3f}"
            leads = (
                str(results.contrast([runs], [larger.shortest(rival)], splits, measure) or MISSING)
                for rival, measure in product(rivals, ("R@1", "nll"))
            )
            rows.append([*_about(runs), *costs, _recall(runs, splits), *leads])
        heads = [f"minus {label(rival)}{of}" for rival, of in product(rivals, ("", ", NLL"))]
        return [["arm", "steps", "lr", "seeds", "GFLOP per pair", "share %", "PFLOP", "R@1 %", *heads], *rows]

    def runs(self) -> Table:
        """Every run: R@1 on validation at the end, mean of both directions, and whether its learning rate is the chosen
        one; the similarity of its experts and the balance of their load at the end; its cost."""
        chosen = {run.name for _, runs in self.groups for run in runs}
        columns: dict[str, Callable[[Result], str]] = {
            "run": lambda run: run.name,
            "arm": lambda run: label(run.config["arm"]),
            "steps": lambda run: str(run.config["steps"]),
            "lr": lambda run: f"{run.config['lr']:g}",
            "seed": lambda run: str(run.seed),
            "validation R@1 %": lambda run: percent(run.selection, 2),
            "chosen rate": lambda run: "yes" if run.name in chosen else "no",
            "cosine of experts": lambda run: _of_layers(run, "similarity", fmean, "{:.3f}".format),
            "load, max / mean": lambda run: _of_layers(run, "load", fmean, "{:.2f}".format),
            "worst layer": lambda run: _of_layers(run, "load", max, "{:.2f}".format),
            "dropped %": lambda run: _of_layers(run, "dropped", fmean, percent),
            "M pairs": lambda run: f"{run.cost['pairs'] / 1e6:.2f}",
            "epochs": lambda run: f"{run.cost['pairs'] / run.config['data']['images']['train']:.1f}",
            "GFLOP per pair": lambda run: f"{run.cost['gflops_per_pair']:.4g}",
            "PFLOP": lambda run: f"{run.cost['train_gflops'] / 1e6:.4g}",
            "M params": lambda run: f"{run.cost['params'] / 1e6:.4g}",
            "active": lambda run: f"{run.cost['active_params'] / 1e6:.4g}",
            "hours, 1 thread": lambda run: f"{run.cost['seconds'] / 3600:.2f}",
            "machine": lambda run: run.cost["machine"]["processor"],
        }
        return [[*columns], *([cell(run) for cell in columns.values()] for run in self.results.values())]

    def _rivals(self, arm: str) -> Iterator[tuple[Group, list[Result], list[Result]]]:
        """The groups of other arms that share a seed with the runs of ``arm`` of the same model and budget: these runs
        and the group's, without what these start from."""
        of_group = dict(self.groups)
        for group, runs in self.groups:
            ours = of_group.get(group._replace(arm=arm), [])
            starts = {run.config["start"] for run in ours}
            theirs = [run for run in runs if run.name not in starts]
            if group.arm != arm and results.lead(ours, theirs):
                yield group, ours, theirs


class Hypothesis(NamedTuple):
    """What a plan asks: whether a lead is above 0, or above minus its margin."""

    words: str
    lead: Lead | None
    seeds: int
    """How many the plan asks for. A lead of fewer is not tested."""
    parts: Sequence[Lead | None] = ()
    """Leads that must be so too."""


def decided(hypotheses: Sequence[Hypothesis]) -> Table:
    """The hypotheses of a plan, without a head: words, lead, p, p corrected for their number by Holm's method, and what
    5 % decides. One that is not tested counts with a p of 1."""
    complete = [of.lead is not None and of.lead.seeds == of.seeds for of in hypotheses]
    p = [of.lead.p if of.lead and tested else 1.0 for of, tested in zip(hypotheses, complete, strict=True)]
    rows = []
    for of, tested, corrected, own in zip(hypotheses, complete, results.holm(p), p, strict=True):
        if tested:
            holds = all(part and part.mean > -part.margin for part in (of.lead, *of.parts))
            verdict = "open" if corrected >= 0.05 else "holds" if holds else "does not hold"
            rows.append([of.words, str(of.lead).strip("*"), f"{own:.2g}", f"{corrected:.2g}", verdict])
        else:
            rows.append([of.words, MISSING, MISSING, MISSING, "not tested"])
    return rows


def _of_layers(run: Result, name: str, over: Callable[[list[float]], float], written: Callable[[float], str]) -> str:
    """A number of the sparse layers, such as their mean load."""
    return written(over([layer[name] for layer in run.layers.values()])) if run.layers else MISSING


def label(arm: str) -> str:
    """An arm's name in tables and figures."""
    return arm.replace("_", " ")


def _about(runs: Sequence[Result]) -> list[str]:
    """Arm, steps, learning rate and number of seeds of a group."""
    config = runs[0].config
    return [label(config["arm"]), str(config["steps"]), f"{config['lr']:g}", str(len(runs))]


def _way(split: str, way: str) -> str:
    return f"{split.removeprefix('test_')} {way}"


def _lead_cells(ours: Collection[Result], theirs: Collection[Result], splits: Sequence[str]) -> list[str]:
    """The leads in R@1 and in NLL, and the number of seeds."""
    leads = [lead for measure in ("R@1", "nll") if (lead := results.lead(ours, theirs, splits, measure=measure))]
    return [*map(str, leads), str(leads[0].seeds)] if leads else [MISSING] * 3


def _recall(runs: Sequence[Result], splits: Sequence[str] = TESTS) -> str:
    return percent(fmean(run.mean("R@1", splits) for run in runs), 2)


def _interval(values: Sequence[float]) -> str:
    """Mean, and ± half of its 95 % interval if there are several values; nothing if there is none."""
    half = results.half_width(values)
    return (f"{fmean(values):.2f}" if values else "") + (f" ± {half:.2f}" if half is not None else "")


def _times(saved: results.Saved) -> str:
    """Mean over seeds and its interval, or a bound of the mean."""
    ratios, bound = saved
    if not ratios or len(bound) > 1:
        return MISSING
    return f"{bound} {fmean(ratios):.2f}" if bound else _interval(ratios)


def _spread(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Mean, and ± the standard deviation over seeds if there are several."""
    spread = f" ± {written(stdev(values))}" if len(values) > 1 else ""
    return written(fmean(values)) + spread
