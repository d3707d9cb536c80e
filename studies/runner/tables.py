"""Tables of a study's results: a head and rows of cells, for the page or for CSV files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from statistics import fmean, stdev

from clipup.evaluate.retrieval import WAYS
from clipup.inspection.figures.format import MISSING, percent

from . import results
from .results import Result

Table = list[list[str]]
"""The head and the rows."""


class Tables:
    """Tables with rows ordered by budget and arm. A group holds the runs of one arm and budget."""

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

    def galleries(self) -> dict[str, dict[str, int]]:
        """The number of ``images`` and distinct ``captions`` by split."""
        test = next(iter(self.results.values())).test
        return {split: {"images": of["gallery"], "captions": of["captions"]} for split, of in test.items()}

    def retrieval(self) -> Table:
        """Recall and negative log-likelihood of every group on every test split, at its chosen learning rate."""
        tests = [split for split in self.galleries() if split.startswith("test_")]
        written = {"R@1": percent, "R@5": percent, "nll": "{:.3f}".format}
        rows = []
        for split, (group, runs) in product(tests, self.groups):
            config = runs[0].config
            pflop = f"{results.total_gflops(runs[0], self.results) / 1e6:.3f}"
            cells = [split, label(group.arm), str(config["steps"]), f"{config['lr']:g}", str(len(runs)), pflop]
            for way, name in product(WAYS, written):
                cells.append(_spread([run.test[split][f"{way}_{name}"] for run in runs], written[name]))
            rows.append(cells)
        measures = [head for way in WAYS for head in (f"{way}_R@1 %", f"{way}_R@5 %", f"{way}_NLL")]
        return [["split", "arm", "steps", "lr", "seeds", "PFLOP", *measures], *rows]

    def leads(self, arm: str, splits: Sequence[str] = results.TESTS) -> Table:
        """R@1 of an arm minus that of every other arm of the same budget, in points: means over the seeds that both
        have; the last but one column is also over splits and directions. The last is the same for the NLL, in nats."""
        rows = []
        for group, pairs in self._pairs(arm):
            leads = [results.lead(pairs, [split], [way]) for split, way in product(splits, WAYS)]
            cells = [label(group.arm), str(group.budget), str(len(pairs)), *map(_lead, leads)]
            rows.append([*cells, _lead(results.lead(pairs, splits)), _nats(results.lead(pairs, splits, measure="nll"))])
        ways = [_way(split, way) for split, way in product(splits, WAYS)]
        return [["minus", f"steps of {label(arm)}", "seeds", *ways, "mean", "NLL"], *rows]

    def leads_by_rate(self, arm: str, others: Sequence[str], splits: Sequence[str] = results.TESTS) -> Table:
        """The lead of an arm over others at the same learning rate and the arm's smallest budget, with the number of
        seeds."""
        budget = min((run.budget for run in self.results.values() if run.config["arm"] == arm), default=None)
        rates = {
            group.arm: of_rate
            for group, of_rate in results.by_rate(self.results.values()).items()
            if group.budget == budget
        }
        lines: Table = []
        for rate, ours in sorted(rates.get(arm, {}).items()):
            cells = []
            for other in others:
                theirs = rates.get(other, {}).get(rate, {})
                pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
                cells += [_lead(results.lead(pairs, splits)), str(len(pairs))] if pairs else [MISSING] * 2
            lines.append([f"{rate:g}", *cells])
        heads = [head for other in others for head in (f"minus {label(other)}", "seeds")]
        return [["learning rate of both", *heads], *lines]

    def growth(self, arm: str, others: Sequence[str], splits: Sequence[str] = results.TESTS) -> Table:
        """R@1 of an arm and others by length of the runs, mean over splits and directions, and the arm's leads. A row
        is over the seeds that all of its arms have; the first is the start of the shortest runs."""
        of_group = dict(self.groups)
        lines: Table = []
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
            lines.append([str(group.budget), str(len(seeds)), *recalls, *leads])
        head = ["steps", "seeds", *map(label, (*others, arm)), *(f"minus {label(other)}" for other in others)]
        return [head, *lines]

    def validation(self, run: str) -> str:
        """A run's R@1 on validation, mean of both directions, for a sentence."""
        return percent(self.results[run].selection, 2)

    def similarity(self, run: str) -> str:
        """The cosine between a run's experts at the end, for a sentence."""
        return f"{self.results[run].similarity:.2f}"

    def comparisons(self, arm: str, others: dict[str, str], splits: Sequence[str] = results.TESTS) -> Table:
        """The leads over other arms, by budget and then in the order of ``others``, without a head: the wording of the
        comparison, the steps of the arm, seeds, the lead in R@1 and its verdict, the lead in NLL and its verdict. The
        wording of the verdicts is the same whether the arm wins or loses.

        Args:
            others: the wording of each comparison by arm, "at equal steps" for ``dense_continued``.
        """
        rows, order = [], list(others)
        pairs_of = [(group, pairs) for group, pairs in self._pairs(arm) if group.arm in others]
        for group, pairs in sorted(pairs_of, key=lambda one: (one[0].budget, order.index(one[0].arm))):
            recall, nll = results.lead(pairs, splits), results.lead(pairs, splits, measure="nll")
            cells = [others[group.arm], f"{group.budget:,}", str(recall.seeds)]
            rows.append([*cells, _lead(recall), _verdict(recall), _nats(nll), _verdict(nll, better=-1)])
        return rows

    def lead(
        self,
        arm: str,
        other: str,
        splits: Sequence[str] = results.TESTS,
        seeds: Sequence[int] | None = None,
        measure: str = "R@1",
        ways: Sequence[str] = WAYS,
        of: Tables | None = None,
    ) -> str:
        """The lead of an arm over another one, each at its smallest budget, over the seeds of both, for a sentence.

        Args:
            seeds: those to take; default all.
            measure: ``R@1`` or ``R@5``, in points, or ``nll``, in nats.
            of: the tables of the other arm; default these.
        """
        theirs = {run.config["seed"]: run for run in (of or self).shortest(other)[1]}
        pairs = [
            (run, theirs[seed])
            for run in self.shortest(arm)[1]
            if (seed := run.config["seed"]) in theirs and (seeds is None or seed in seeds)
        ]
        if not pairs:
            return MISSING
        found = results.lead(pairs, splits, ways, measure)
        return _nats(found) if measure == "nll" else _lead(found)

    def beside(self, larger: Tables, rivals: Sequence[str], splits: Sequence[str] = results.TESTS) -> Table:
        """Every arm beside arms of a larger dense model, ``rivals``: the FLOPs of a pair in inference, also as a share
        of the larger model's; those of training, the start's included; R@1, mean over splits and directions; and the
        leads over the rivals, in R@1 (points) and NLL (nats)."""
        of_larger = larger.shortest(rivals[0])[1][0].cost["gflops_per_pair"]
        rows = []
        for group, runs in self.groups:
            first, arm = runs[0], group.arm
            gflops = first.cost["gflops_per_pair"]
            pflop = results.total_gflops(first, self.results) / 1e6
            leads = [self.lead(arm, one, splits, measure=of, of=larger) for one in rivals for of in ("R@1", "nll")]
            cells = [label(arm), str(first.config["steps"]), f"{first.config['lr']:g}", str(len(runs))]
            cells += [f"{gflops:.4f}", percent(gflops / of_larger, 0), f"{pflop:.3f}", _recall(runs, splits)]
            rows.append([*cells, *leads])
        heads = [f"minus {label(one)}{of}" for one in rivals for of in ("", ", NLL")]
        return [["arm", "steps", "lr", "seeds", "GFLOP per pair", "share %", "PFLOP", "R@1 %", *heads], *rows]

    def gain(self, arm: str, splits: Sequence[str] = results.TESTS) -> str:
        """R@1 of an arm minus that of its starts, at its smallest budget, in points, for a sentence."""
        runs = self.shortest(arm)[1]
        starts = self.starts_of(runs)
        return _lead(results.lead(list(zip(runs, starts, strict=True)), splits)) if starts else MISSING

    def leads_by_start(self, arm: str, others: Sequence[str], splits: Sequence[str] = results.TESTS) -> Table:
        """By the steps of the dense start: what ``others[1]`` gains over ``others[0]`` on validation, and the arm's
        leads over both, at its smallest budget, over the seeds that all arms of all rows have. Starts with a single
        seed are left out."""
        fewer, more = others
        starts, seeds = self._comparable_starts(arm, others)
        lines = []
        for steps in starts:
            of = self.of_start(steps)
            leads = [of.lead(more, fewer, ["validation"], seeds), *(of.lead(arm, one, splits, seeds) for one in others)]
            lines.append([str(steps), str(len(seeds)), *leads])
        gain = f"{label(more)} minus {label(fewer)}, validation"
        return [["steps of the start", "seeds", gain, *(f"minus {label(other)}" for other in others)], *lines]

    def _comparable_starts(self, arm: str, others: Sequence[str]) -> tuple[list[int], list[int]]:
        """The starts that ``leads_by_start`` is about, and the seeds that all of ``arm`` and ``others`` have there."""
        seeds: dict[int, set[int]] = {}
        for steps in self.starts:
            pairs = self.of_start(steps).shortest_pairs(arm)
            of_arms = [{ours.config["seed"] for ours, _ in pairs.get(other, [])} for other in others]
            seeds[steps] = set.intersection(*of_arms)
        starts = [steps for steps in self.starts if len(seeds[steps]) > 1]  # one seed has no interval
        return starts, sorted(set.intersection(*(seeds[steps] for steps in starts))) if starts else []

    def recovery(self, arms: Sequence[str]) -> Table:
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
                rows.append([label(arm), str(steps[-1]), str(len(runs)), first, least, *share, last])
        head = ["arm", "steps", "seeds", "start", "lowest", "after", "at the start's level after", "end"]
        return [head, *rows]

    def differences(self, arm: str, splits: Sequence[str] = results.TESTS) -> Table:
        """R@1 of an arm minus that of every other arm of the same budget, on the same captions, in points, one row per
        pair of runs with the same seed. Images are left out: many share a caption, so they are not independent."""
        rows = []
        for ours, theirs in (pair for _, pairs in self._pairs(arm) for pair in pairs):
            found = [results.paired_difference(ours, theirs, split, WAYS[0]) for split in splits]
            cells = [f"{100 * difference:+.2f} ± {100 * half:.2f}" for difference, half in found]
            rows.append([ours.name, theirs.name, *cells])
        return [["run", "minus", *(_way(split, WAYS[0]) for split in splits)], *rows]

    def runs(self) -> Table:
        """Every run: R@1 on validation at the end, mean of both directions, and whether its learning rate is the chosen
        one; the similarity of its experts and the balance of their load at the end; its cost."""
        picked = {run.name for _, runs in self.groups for run in runs}
        rows = []
        for run in self.results.values():
            config, cost = run.config, run.cost
            rows.append(
                [
                    *(run.name, label(config["arm"]), str(config["steps"]), f"{config['lr']:g}", str(config["seed"])),
                    *(percent(run.selection, 2), "yes" if run.name in picked else "no"),
                    *_experts(run),
                    f"{cost['pairs'] / 1e6:.2f}",
                    f"{cost['pairs'] / self.data()['images']['train']:.1f}",
                    f"{cost['gflops_per_pair']:.4f}",
                    f"{cost['train_gflops'] / 1e6:.3f}",
                    *(f"{cost[count] / 1e6:.2f}" for count in ("params", "active_params")),
                    *(f"{cost['seconds'] / 3600:.2f}", cost["machine"]["processor"]),
                ]
            )
        head = ["run", "arm", "steps", "lr", "seed", "validation R@1 %", "chosen rate"]
        head += ["cosine of experts", "load, max / mean", "worst layer", "dropped %", "M pairs", "epochs"]
        head += ["GFLOP per pair", "PFLOP", "M params", "active", "hours, 1 thread", "machine"]
        return [head, *rows]

    def machines(self) -> str:
        """The machines of the runs with their seeds, for a sentence.

        Raises:
            ValueError: the runs of one seed were made on two machines, so that more differs between them than the arm.
        """
        of_seed: dict[int, str] = {}
        for run in sorted(self.results.values(), key=lambda run: run.config["seed"]):
            seed, processor = run.config["seed"], run.cost["machine"]["processor"]
            if of_seed.setdefault(seed, processor) != processor:
                raise ValueError(f"seed {seed} has runs on {of_seed[seed]} and {processor}: run the seed again on one")
        seeds = {name: [str(seed) for seed, of in of_seed.items() if of == name] for name in of_seed.values()}
        return "; ".join(f"{name}, seeds {', '.join(of)}" for name, of in seeds.items())

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


def _experts(run: Result) -> list[str]:
    if not run.layers:
        return [MISSING] * 4
    loads, dropped = ([layer[name] for layer in run.layers.values()] for name in ("load", "dropped"))
    return [f"{run.similarity:.3f}", f"{fmean(loads):.2f}", f"{max(loads):.2f}", percent(fmean(dropped))]


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
