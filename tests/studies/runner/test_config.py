"""Config files of runs: what they may say, and what the study's own files say."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

import pytest

from clipup.clip import flops
from clipup.models import factory
from clipup.moe.config import MoEConfig
from clipup.upcycling.upcycle import upcycle
from studies.runner import config

STUDIES = Path(__file__).parents[3] / "studies"
FROM_SCRATCH = {"dense", "sparse_scratch"}
VARIATIONS = {
    "limoe",
    "capacity_2",
    "drop_upcycling",
    "fine_grained",
    "loss_free",
    "z_score",
    "experts_16",
    "image_only",
}
VERDICT = {"dense_continued", "dense_equal_flops", "clip_up"}
GOING_ON = VERDICT | {"limoe"}
COMPLETE = "arm: clip_up\nmodel: clipup-icons-w64\nsteps: 10\nlr: 0.001\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "a-run.yaml"
        path.write_text(text)
        return path

    return write


def read_all(study: str) -> list[config.StudyRun]:
    return [config.read(path) for path in sorted((STUDIES / study).glob("*.yaml"))]


@pytest.fixture(scope="module", params=["icons", "icons-w384", "converged", "converged_rate", "scenes"])
def committed(request):
    return read_all(request.param)


@pytest.fixture(scope="module")
def icons():
    return read_all("icons")


def test_a_config_names_its_run_by_its_file_and_changes_the_preset(write):
    run = config.read(write(COMPLETE + "moe: {num_experts: 4, blocks: [1]}\nstart: dense\n"))

    assert (run.name, run.steps, run.lr, run.start) == ("a-run", 10, 0.001, "dense")
    assert run.moe_cfg == MoEConfig.clip_up(num_experts=4, blocks=(1,), towers=("image", "text"))
    assert config.read(write(COMPLETE + "moe: {}\n")).moe_cfg == MoEConfig.clip_up(towers=("image", "text"))
    assert config.read(write(COMPLETE)).moe_cfg is None


@pytest.mark.parametrize(
    "text, message",
    [
        (COMPLETE + "learning_rate: 1\n", r"a-run\.yaml.*learning_rate"),
        ("arm: dense\nsteps: 10\n", r"a-run\.yaml.*'model' and 'lr'"),
        (COMPLETE + "moe: {num_experts: 0}\n", r"a-run\.yaml: num_experts"),
        (COMPLETE + "others: [a]\nmoe: {}\n", "others and clusters"),
        (COMPLETE + "clusters: true\nstart: a\n", "others and clusters"),
    ],
)
def test_what_a_config_gets_wrong_is_named(write, text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config.read(write(text))


def test_every_run_of_the_study_starts_from_a_run_of_the_study(committed):
    names = {run.name for run in committed}

    assert names and {run.start for run in committed if run.start} <= names


def test_runs_of_the_study_are_called_what_they_are(committed):
    for run in committed:
        assert run.name.startswith(run.arm) and f"-{run.steps}-" in run.name
        assert f"-lr{run.lr:g}-" in run.name and run.name.endswith(f"-s{run.seed}") and run.why


def test_dense_runs_at_equal_flops_cost_what_clip_up_costs_in_the_steps_of_their_budget(committed):
    (model,) = {run.model for run in committed}
    ratio = cost_ratio(model)
    equal = [run for run in committed if run.arm == "dense_equal_flops"]

    assert equal and all(run.steps == round(run.budget * ratio) for run in equal)


def test_dense_runs_at_equal_seconds_take_what_clip_up_was_measured_to_take(icons):
    with (STUDIES / "icons" / "step.csv").open(newline="") as file:
        ratio = {row["impl"]: float(row["seconds_ratio"]) for row in csv.DictReader(file)}
    equal = [run for run in icons if run.arm == "dense_equal_seconds"]

    assert min(ratio["dense"], ratio["dense_unpadded"]) > 0.97  # of the faster dense model, or as good as
    assert equal and all(run.steps == round(run.budget * ratio["clip_up"]) for run in equal)


def test_runs_from_scratch_cost_what_dense_start_and_clip_up_cost_together(icons):
    ratio = cost_ratio("clipup-icons-w64")
    steps = {
        "sparse_scratch": lambda budget: 5000 / ratio + budget,
        "dense_scratch": lambda budget: 5000 + budget * ratio,
    }
    found = [run for run in icons if run.arm in steps]

    assert {run.arm for run in found} == steps.keys()
    assert all(run.steps == round(steps[run.arm](run.budget)) for run in found)


@pytest.fixture(scope="module")
def converged():
    return read_all("converged")


def test_arms_from_a_converged_start_go_on_from_a_dense_run_of_their_own_seed(converged):
    starts = {run.name: run for run in converged if run.arm == "dense"}

    assert {run.seed for run in starts.values() if run.steps == 30000} == set(range(8))
    assert {run.lr for run in starts.values()} == {0.002}  # one schedule
    for run in converged:
        if run.arm != "dense":
            start = starts[run.start]
            assert start.seed == run.seed
            assert (f"-from{start.steps}-" in run.name) == (start.steps != 15000), run.name


def test_arms_from_a_converged_start_are_tuned_with_the_same_rates_and_seeds(converged):
    tuned: dict[tuple[str, str], set[tuple[float, int]]] = {}
    for run in converged:
        if run.arm in VERDICT and (run.budget or run.steps) == 5000 and run.seed < 3:
            start = run.start.partition("-lr")[0]
            tuned.setdefault((start, run.arm), set()).add((run.lr, run.seed))

    assert {arm for _, arm in tuned} == VERDICT
    rates = {(lr, seed) for lr in (0.0005, 0.001, 0.002, 0.004) for seed in range(3)}
    assert tuned["dense-15000", "clip_up"] == rates
    assert all(found == tuned[start, "clip_up"] for (start, _), found in tuned.items()), tuned


def test_runs_at_a_higher_rate_are_those_of_the_verdict_but_for_the_rate(converged):
    of_verdict = {run.name: run for run in converged}
    starts, higher = (
        [run for run in read_all("converged_rate") if (run.arm == "dense") == of_start] for of_start in (True, False)
    )

    assert all(run == of_verdict[run.name] for run in starts)
    assert {(run.arm, run.seed) for run in higher} == {(arm, seed) for arm in VERDICT for seed in range(3)}
    for run in higher:
        same = of_verdict[run.name.replace("-lr0.008-", "-lr0.004-")]
        assert run.lr == 0.008 and dataclasses.replace(run, name=same.name, lr=same.lr, why=same.why) == same


@functools.cache
def cost_ratio(model: str) -> float:
    """FLOPs of a pair, CLIP-UP's over the dense model's."""
    dense = factory.create_on_meta(model)
    costs = [sum(flops.count(one)[:2]) for one in (dense, upcycle(dense, MoEConfig.clip_up()))]
    return costs[1] / costs[0]


@pytest.mark.parametrize("arms", [FROM_SCRATCH, GOING_ON], ids=["from scratch", "going on"])
def test_every_learning_rate_of_one_arm_is_one_of_all_arms_like_it(arms, icons):
    """Dense arms are tuned as hard as sparse ones, all at the same rates."""
    rates: dict[str, set[float]] = {}
    for run in icons:
        if run.seed == 0 and run.arm in arms and (run.budget or run.steps) in (2500, 5000):
            rates.setdefault(run.arm, set()).add(run.lr)

    assert rates.keys() == arms and len({frozenset(found) for found in rates.values()}) == 1, rates
    assert all(len(found) == 3 for found in rates.values())


def test_the_arms_of_the_verdict_have_the_same_rates_seeds_and_lengths(icons):
    """Two rates with three seeds each, the chosen one with five at two lengths, and one run of the greatest length."""
    for arm in VERDICT:
        own = [run for run in icons if run.arm == arm]
        lengths = {(run.budget or run.steps, run.lr, run.seed) for run in own}

        assert {(2500, lr, seed) for lr in (0.004, 0.008) for seed in range(3)} <= lengths, arm
        assert {(length, 0.004, seed) for length in (2500, 7500) for seed in range(5)} <= lengths, arm
        assert (25000, 0.004, 0) in lengths, arm
        assert lengths == {(run.budget or run.steps, run.lr, run.seed) for run in icons if run.arm == "clip_up"}, arm


def test_every_variation_of_clip_up_has_the_seeds_that_a_difference_takes(icons):
    """All of them or none: nothing is repeated because of what its first seed gave."""
    seeds: dict[str, set[int]] = {}
    for run in icons:
        if run.arm in VARIATIONS and (run.steps, run.lr) == (2500, 0.004):
            seeds.setdefault(run.arm, set()).add(run.seed)

    assert seeds == {arm: {0, 1, 2} for arm in VARIATIONS}
