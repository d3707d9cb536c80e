"""Tables of a study's results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from statistics import fmean, stdev

from clipup.evaluate.retrieval import WAYS
from clipup.inspection.figures.format import MISSING, percent

from . import results
from .results import Result


class Tables:
    """Tables in Markdown, with rows ordered by budget and arm. A group holds the runs of one arm and budget."""

    def __init__(self, found: dict[str, Result]) -> None:
        self.results = dict(sorted(found.items()))

    @cached_property
    def groups(self) -> list[tuple[results.Group, list[Result]]]:
        return sorted(results.chosen(self.results.values()).items())

    @cached_property
    def starts(self) -> list[int]:
        """The steps of the runs that others start from."""
        steps = {results.start_steps(run, self.results) for run in self.results.values()}
        return sorted(one for one in steps if one is not None)

    def of_start(self, steps: int) -> Tables:
        """The tables of the runs from starts of so many steps."""
        return Tables(results.of_start(self.results, steps))

    def difference(self, run: str, other: str) -> str:
        """R@1 of a run minus that of another one, mean over styles, names and directions, in points."""
        return _lead(results.lead([(self.results[run], self.results[other])]))

    def with_runs_of(self, other: Tables) -> Tables:
        """The tables of these runs and another study's."""
        return Tables(self.results | other.results)

    def data(self) -> dict:
        """The description of the data in the logs, which must be the same in all of them."""
        seen = {one.config["data"]["fingerprint"]: one.config["data"] for one in self.results.values()}
        if len(seen) > 1:
            raise ValueError(f"the logs are of {len(seen)} different data sets: run the study on one")
        (data,) = seen.values()
        return data

    def galleries(self) -> dict[str, dict[str, float]]:
        """The number of ``images`` and distinct ``captions`` by split, the R@1 of guessing, ``chance``, which is equal
        in both directions if every image has one caption, and ``uniform_nll``, the NLL of an image's caption if all
        are equally likely."""
        test = next(iter(self.results.values())).test
        sizes = {split: (of["gallery"], of["captions"]) for split, of in test.items()}
        return {
            split: {"images": images, "captions": captions, "chance": 1 / captions, "uniform_nll": math.log(captions)}
            for split, (images, captions) in sizes.items()
        }

    def retrieval(self, split: str) -> str:
        """Recall and negative log-likelihood of every group on a split, at its chosen learning rate."""
        rows = []
        for group, runs in self.groups:
            config = runs[0].config
            cells = [label(group.arm), f"{config['steps']:,}", f"{config['lr']:g}", str(len(runs)), self._pflop(runs)]
            for way, (name, written) in product(WAYS, (("R@1", percent), ("R@5", percent), ("nll", "{:.3f}".format))):
                cells.append(_spread([run.test[split][f"{way}_{name}"] for run in runs], written))
            rows.append(cells)
        measures = [head for way in WAYS for head in (f"{way}_R@1 %", "R@5 %", "NLL")]
        return _table(["arm", "steps", "lr", "seeds", "PFLOP", *measures], rows)

    def leads(self, arm: str, splits: Sequence[str] = results.TESTS) -> str:
        """R@1 of an arm minus that of every other arm of the same budget, in points: means over the seeds that both
        have; the last but one column is also over splits and directions. The last is the same for the NLL, in nats."""
        rows = []
        for group, pairs in self._pairs(arm):
            leads = [results.lead(pairs, [split], [way]) for split, way in product(splits, WAYS)]
            cells = [label(group.arm), f"{group.budget:,}", str(len(pairs)), *map(_lead, leads)]
            rows.append([*cells, _lead(results.lead(pairs, splits)), _nats(results.lead(pairs, splits, measure="nll"))])
        ways = [_way(split, way) for split, way in product(splits, WAYS)]
        return _table(["minus", "budget", "seeds", *ways, "mean", "NLL"], rows)

    def leads_by_rate(self, arm: str, others: Sequence[str], splits: Sequence[str] = results.TESTS) -> str:
        """The lead of an arm over others at the same learning rate and the arm's smallest budget, with the number of
        seeds."""
        budget = min((run.budget for run in self.results.values() if run.config["arm"] == arm), default=None)
        rates = {
            group.arm: of_rate
            for group, of_rate in results.by_rate(self.results.values()).items()
            if group.budget == budget
        }
        lines: list[list[str]] = []
        for rate, ours in sorted(rates.get(arm, {}).items()):
            cells = []
            for other in others:
                theirs = rates.get(other, {}).get(rate, {})
                pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
                cells += [_lead(results.lead(pairs, splits)), str(len(pairs))] if pairs else [MISSING] * 2
            lines.append([f"{rate:g}", *cells])
        heads = [head for other in others for head in (f"minus {label(other)}", "seeds")]
        return _table(["learning rate of both", *heads], lines)

    def growth(self, arm: str, others: Sequence[str], splits: Sequence[str] = results.TESTS) -> str:
        """R@1 of an arm and others by length of the runs, mean over splits and directions, and the arm's leads. A row
        is over the seeds that all of its arms have; the first is the start of the shortest runs."""
        of_group, lines = dict(self.groups), []
        for group in (group for group, _ in self.groups if group.arm == arm):
            of_arm = {
                name: {run.config["seed"]: run for run in of_group[group._replace(arm=name)]}
                for name in (*others, arm)
                if group._replace(arm=name) in of_group
            }
            seeds = sorted(set.intersection(*map(set, of_arm.values())))
            found = {name: [of_seed[seed] for seed in seeds] for name, of_seed in of_arm.items()}
            starts = self.starts_of(found[arm])
            if starts and not lines:
                before = _recall(starts, splits)
                lines.append(["0", str(len(seeds)), *[before] * (1 + len(others)), *[MISSING] * len(others)])
            recalls = [_recall(found[name], splits) if name in found else MISSING for name in (*others, arm)]
            pairs = {name: list(zip(found[arm], runs, strict=True)) for name, runs in found.items()}
            leads = [_lead(results.lead(pairs[name], splits)) if name in pairs else MISSING for name in others]
            lines.append([f"{group.budget:,}", str(len(seeds)), *recalls, *leads])
        head = ["steps", "seeds", *map(label, (*others, arm)), *(f"minus {label(other)}" for other in others)]
        return _table(head, lines)

    def validation(self, run: str) -> str:
        """A run's R@1 on validation, mean of both directions, for a sentence."""
        return percent(self.results[run].selection, 2)

    def similarity(self, run: str) -> str:
        """The cosine between a run's experts at the end, for a sentence."""
        return f"{self.results[run].similarity:.2f}"

    def verdict(
        self, arm: str, others: dict[str, str], measure: str = "R@1", splits: Sequence[str] = results.TESTS
    ) -> str:
        """The leads over other arms in one sentence, with the same wording whether the arm wins or loses: those over
        several seeds first, in points or nats, with budget and seeds in parentheses, then those with a single seed,
        which decide nothing.

        Args:
            others: the wording of each comparison by arm, "at equal steps" for ``dense_continued``.
            measure: ``R@1``, or ``nll``, where lower is better.
        """
        better, written = (1, _lead) if measure == "R@1" else (-1, _nats)
        decided, single = [], []
        for group, pairs in self._pairs(arm):
            if group.arm in others:
                lead = results.lead(pairs, splits, measure=measure)
                name, steps, points = others[group.arm], f"{group.budget:,}", written(lead)
                if lead.half_width is None:
                    single.append(f"{name} ({steps}) {points}")
                else:
                    decided.append(f"{name} ({steps}; {lead.seeds} seeds) {_verdict(lead, better)}, {points}")
        if single:
            decided.append(f"with one seed each, which decides nothing: {', '.join(single)}")
        return "; ".join(decided) or "there is no run to compare yet"

    def comparisons(self, arm: str, others: dict[str, str], splits: Sequence[str] = results.TESTS) -> list[list[str]]:
        """The leads in R@1 over other arms as rows of a table, by budget and then in the order of ``others``: the
        wording of the comparison, the steps of the arm, seeds, lead and verdict. ``others``: as of ``verdict``."""
        order = list(others)
        of_others = [(group, results.lead(pairs, splits)) for group, pairs in self._pairs(arm) if group.arm in others]
        return [
            [others[group.arm], f"{group.budget:,}", str(lead.seeds), _lead(lead), _verdict(lead)]
            for group, lead in sorted(of_others, key=lambda one: (one[0].budget, order.index(one[0].arm)))
        ]

    def lead(
        self,
        arm: str,
        other: str,
        splits: Sequence[str] = results.TESTS,
        seeds: Sequence[int] | None = None,
        measure: str = "R@1",
    ) -> str:
        """The lead of an arm over another one at its smallest budget, in points, for a sentence. ``seeds``: default
        all. ``measure``: ``R@1`` or ``R@5``."""
        pairs = self.shortest_pairs(arm).get(other, [])
        of_seeds = [pair for pair in pairs if seeds is None or pair[0].config["seed"] in seeds]
        return _lead(results.lead(of_seeds, splits, measure=measure)) if of_seeds else MISSING

    def gain(self, arm: str, splits: Sequence[str] = results.TESTS) -> str:
        """R@1 of an arm minus that of its starts, at its smallest budget, in points, for a sentence."""
        runs = self.shortest(arm)[1]
        starts = self.starts_of(runs)
        return _lead(results.lead(list(zip(runs, starts, strict=True)), splits)) if starts else MISSING

    def leads_by_start(self, arm: str, others: Sequence[str], splits: Sequence[str] = results.TESTS) -> str:
        """By the steps of the dense start: what ``others[1]`` gains over ``others[0]`` on validation, and the arm's
        leads over both, at its smallest budget, over the seeds that all arms of all rows have. Starts with a single
        seed are left out."""
        fewer, more = others
        starts, seeds = self.comparable_starts(arm, others)
        lines = []
        for steps in starts:
            of = self.of_start(steps)
            leads = [of.lead(more, fewer, ["validation"], seeds), *(of.lead(arm, one, splits, seeds) for one in others)]
            lines.append([f"{steps:,}", str(len(seeds)), *leads])
        gain = f"{label(more)} minus {label(fewer)}, validation"
        return _table(["steps of the start", "seeds", gain, *(f"minus {label(other)}" for other in others)], lines)

    def comparable_starts(self, arm: str, others: Sequence[str]) -> tuple[list[int], list[int]]:
        """The starts that ``leads_by_start`` is about, and the seeds that all of ``arm`` and ``others`` have there."""
        seeds: dict[int, set[int]] = {}
        for steps in self.starts:
            pairs = self.of_start(steps).shortest_pairs(arm)
            of_arms = [{ours.config["seed"] for ours, _ in pairs.get(other, [])} for other in others]
            seeds[steps] = set.intersection(*of_arms)
        starts = [steps for steps in self.starts if len(seeds[steps]) > 1]  # one seed has no interval
        return starts, sorted(set.intersection(*(seeds[steps] for steps in starts))) if starts else []

    def recovery(self, arms: Sequence[str]) -> str:
        """How far a run falls below its start: R@1 on validation, mean of both directions, of the start, at the lowest
        evaluation and at the end, and the share of the steps after which the runs are at the start's level again. Means
        over the seeds of each arm at its smallest budget and chosen rate."""
        rows = []
        for arm in arms:
            _, runs = self.shortest(arm)
            if runs:
                start = fmean(run.selection for run in self.starts_of(runs))
                steps = [one["step"] for one in runs[0].validations]
                validations = [run.validations for run in runs]
                curve = [fmean(map(_of_validation, records)) for records in zip(*validations, strict=True)]
                lowest = min(range(len(steps)), key=curve.__getitem__)
                back = next((at for at in range(lowest, len(steps)) if curve[at] >= start), None)
                share = [MISSING if at is None else f"{steps[at] / steps[-1]:.0%}" for at in (lowest, back)]
                first, least, last = (percent(value, 2) for value in (start, curve[lowest], curve[-1]))
                rows.append([label(arm), f"{steps[-1]:,}", str(len(runs)), first, least, *share, last])
        head = ["arm", "steps", "seeds", "start", "lowest", "after", "at the start's level after", "end"]
        return _table(head, rows)

    def differences(self, arm: str, splits: Sequence[str] = results.TESTS) -> str:
        """R@1 of an arm minus that of every other arm of the same budget, on the same captions, in points, one row per
        pair of runs with the same seed. Images are left out: many share a caption, so they are not independent."""
        rows = []
        for ours, theirs in (pair for _, pairs in self._pairs(arm) for pair in pairs):
            found = [results.paired_difference(ours, theirs, split, WAYS[0]) for split in splits]
            cells = [f"{100 * difference:+.2f} ± {100 * half:.2f}" for difference, half in found]
            rows.append([f"`{ours.name}`", f"`{theirs.name}`", *cells])
        return _table(["run", "minus", *(_way(split, WAYS[0]) for split in splits)], rows)

    def sweep(self, with_seeds: bool = False) -> str:
        """Validation at the end by learning rate: the mean R@1 of both directions, with the chosen rate in bold.
        ``with_seeds``: the seeds of a rate are given where the rates of an arm have different ones."""
        picked = {run.name for _, runs in self.groups for run in runs}
        rows = []
        for group, rates in sorted(results.by_rate(self.results.values()).items()):
            named = with_seeds and len({frozenset(of_seed) for of_seed in rates.values()}) > 1
            cells = []
            for rate, of_seed in sorted(rates.items()):
                runs = [of_seed[seed] for seed in sorted(of_seed)]
                of_seeds = f" (seeds {', '.join(map(str, sorted(of_seed)))})" if named else ""
                text = f"{rate:g}{of_seeds}: {' / '.join(percent(run.selection, 2) for run in runs)}"
                cells.append(f"**{text}**" if runs[0].name in picked else text)
            rows.append([label(group.arm), f"{runs[0].config['steps']:,}", ", ".join(cells)])
        return _table(["arm", "steps", "learning rate: R@1 on validation, by seed"], rows)

    def experts(self) -> str:
        """Similarity of the experts and balance of their load at the end of each run."""
        rows = []
        for run in self.results.values():
            if layers := run.layers.values():
                loads, dropped = ([layer[name] for layer in layers] for name in ("load", "dropped"))
                cells = [f"`{run.name}`", f"{run.similarity:.3f}", f"{fmean(loads):.2f}", f"{max(loads):.2f}"]
                rows.append([*cells, percent(fmean(dropped))])
        return _table(["run", "cosine of experts", "load, max / mean", "worst layer", "dropped %"], rows)

    def costs(self) -> str:
        """The cost of every run."""
        columns = {
            "steps": lambda cost: f"{cost['steps']:,}",
            "M pairs": lambda cost: f"{cost['pairs'] / 1e6:.2f}",
            "epochs": lambda cost: f"{cost['pairs'] / self.data()['images']['train']:.1f}",
            "GFLOP per pair": lambda cost: f"{cost['gflops_per_pair']:.4f}",
            "PFLOP": lambda cost: f"{cost['train_gflops'] / 1e6:.3f}",
            "M params": lambda cost: f"{cost['params'] / 1e6:.2f}",
            "active": lambda cost: f"{cost['active_params'] / 1e6:.2f}",
            "hours, 1 thread": lambda cost: f"{cost['seconds'] / 3600:.2f}",
            "machine": lambda cost: cost["machine"]["processor"],
        }
        rows = [[f"`{run.name}`", *(cell(run.cost) for cell in columns.values())] for run in self.results.values()]
        return _table(["run", *columns], rows)

    def machines(self) -> str:
        """The machines of the runs with their seeds.

        Raises:
            ValueError: the runs of one seed were made on two machines, so that more differs between them than the arm.
        """
        of_seed: dict[int, str] = {}
        for run in sorted(self.results.values(), key=lambda run: run.config["seed"]):
            seed, processor = run.config["seed"], run.cost["machine"]["processor"]
            if of_seed.setdefault(seed, processor) != processor:
                raise ValueError(f"seed {seed} has runs on {of_seed[seed]} and {processor}: run the seed again on one")
        seeds = {name: [str(seed) for seed, of in of_seed.items() if of == name] for name in of_seed.values()}
        return _table(["machine", "seeds"], [[name, ", ".join(of)] for name, of in seeds.items()])

    def _pairs(self, arm: str) -> list[tuple[results.Group, list[tuple[Result, Result]]]]:
        """For each group of another arm, the runs of ``arm`` with the same model and budget, each paired with the
        group's run of the same seed."""
        of_group = dict(self.groups)
        found = []
        for group, runs in self.groups:
            theirs = {run.config["seed"]: run for run in runs}
            ours = of_group.get(group._replace(arm=arm), []) if group.arm != arm else []
            pairs = [(run, theirs[run.config["seed"]]) for run in ours if run.config["seed"] in theirs]
            pairs = [(run, other) for run, other in pairs if other.name != run.config["start"]]
            if pairs:
                found.append((group, pairs))
        return found

    def shortest(self, arm: str) -> tuple[int | None, list[Result]]:
        """The smallest budget of an arm, and its runs."""
        found = [(group.budget, runs) for group, runs in self.groups if group.arm == arm]
        return min(found, key=lambda one: one[0], default=(None, []))

    def shortest_pairs(self, arm: str) -> dict[str, list[tuple[Result, Result]]]:
        """The pairs of the arm's smallest budget by the other arm."""
        budget, _ = self.shortest(arm)
        return {group.arm: pairs for group, pairs in self._pairs(arm) if group.budget == budget}

    def starts_of(self, runs: Sequence[Result]) -> list[Result]:
        """What the runs start from, for those that start from another run."""
        return [start for run in runs for start in results.before(run, self.results)[:1]]

    def _pflop(self, runs: Sequence[Result]) -> str:
        return f"{results.total_gflops(runs[0], self.results) / 1e6:.3f}"


def _of_validation(record: dict) -> float:
    return fmean(record[f"{way}_R@1"] for way in WAYS)


def label(arm: str) -> str:
    """An arm's name in tables and figures."""
    return arm.replace("_", " ")


def _way(split: str, way: str) -> str:
    return f"{split.removeprefix('test_')} {way}"


def _lead(lead: results.Lead) -> str:
    """A lead in R@1, in points; bold if the interval excludes 0."""
    return _with_interval(lead, 100, 2)


def _verdict(lead: results.Lead, better: int = 1) -> str:
    if not lead.sure:
        return "one seed" if lead.half_width is None else "not decided"
    return "better" if better * lead.mean > 0 else "worse"


def _nats(lead: results.Lead) -> str:
    """A lead in NLL; bold if the interval excludes 0."""
    return _with_interval(lead, 1, 3)


def _with_interval(lead: results.Lead, scale: int, decimals: int) -> str:
    text = f"{scale * lead.mean:+.{decimals}f}"
    text += "" if lead.half_width is None else f" ± {scale * lead.half_width:.{decimals}f}"
    return f"**{text}**" if lead.sure else text


def _recall(runs: Sequence[Result], splits: Sequence[str]) -> str:
    return percent(fmean(run.mean("R@1", splits) for run in runs), 2)


def _spread(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Mean, and ± the standard deviation over seeds if there are several."""
    spread = f" ± {written(stdev(values))}" if len(values) > 1 else ""
    return written(fmean(values)) + spread


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *(rows or [[MISSING] * len(head)])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
