"""The file of a study: which runs its grids stand for, and what the studies' own files say."""

import functools
from pathlib import Path

import pytest

from clipup.clip import flops
from clipup.models import factory
from clipup.moe.config import MoEConfig
from clipup.upcycling.upcycle import upcycle
from studies.runner import config

STUDIES = Path(__file__).parents[3] / "studies"
GRID = """
model: clipup-icons-w64
arms:
  dense: {steps: 20}
  equal: {start: "dense-20-lr0.1-s{seed}", why: "As {budget:,} steps"}
  clip_up: {start: "dense-20-lr0.1-s{seed}", steps: 10, moe: {num_experts: 4, blocks: [1]}}
runs:
- {arm: dense, lr: 0.1, seed: 0}
- {arm: [clip_up], lr: [0.1, 0.05], seed: [0, 1]}
- {name: "{arm}-again-s{seed}", arm: equal, budget: 1000, steps: 13, lr: 0.1, seed: 2, why: "{why}, again."}
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> dict[str, config.StudyRun]:
        (tmp_path / config.FILE).write_text(text)
        return config.read(tmp_path)

    return read


def test_a_grid_is_a_run_per_arm_rate_and_seed(read):
    runs = read(GRID)
    rates = [f"clip_up-10-lr{lr}-s{seed}" for lr in (0.1, 0.05) for seed in (0, 1)]
    assert list(runs) == ["dense-20-lr0.1-s0", *rates, "equal-again-s2"]
    dense, sparse, again = runs["dense-20-lr0.1-s0"], runs["clip_up-10-lr0.05-s1"], runs["equal-again-s2"]
    assert (sparse.name, sparse.steps, sparse.lr, sparse.seed) == ("clip_up-10-lr0.05-s1", 10, 0.05, 1)
    assert sparse.start == "dense-20-lr0.1-s1" and dense.start is None and dense.moe_cfg is None
    assert sparse.moe_cfg == MoEConfig.clip_up(num_experts=4, blocks=(1,), towers=("image", "text"))
    assert (again.budget, again.why) == (1000, "As 1,000 steps, again.")


@pytest.mark.parametrize(
    "before, after, names",
    [
        ("steps: 20", "steps: 20, learning_rate: 1", "learning_rate"),
        ("steps: 20", "", "steps"),
        ("num_experts: 4", "num_experts: 0", "num_experts"),
        ("steps: 20", "steps: 20, clusters: true", "clusters"),
        ("arm: equal", "arm: equals", "equals"),
        ("again-s{seed}", "10-lr0.05-s1", "two runs are named"),
    ],
)
def test_an_invalid_file_is_refused_by_the_name_of_its_fault(read, before, after, names):
    text = GRID.replace(before, after).replace("{arm}-10", "clip_up-10")
    with pytest.raises(ValueError, match=rf"study\.yaml: .*{names}"):
        read(text)


PRESET = ["icons", "converged", "converged_rate", "narrow"]
ALL_BLOCKS = [("controls", {"blocks": "every"}), ("fresh", {"blocks": "every", "num_experts": 16})]


@pytest.mark.parametrize(("study", "moe"), [*((study, {}) for study in PRESET), *ALL_BLOCKS])
def test_dense_runs_at_equal_flops_cost_what_their_arm_says_and_every_start_is_a_run(study, moe):
    runs = config.read(STUDIES / study)
    equal = [run for run in runs.values() if run.arm == "dense_equal_flops"]
    (model,) = {run.model for run in equal}
    dense = factory.create_on_meta(model)
    costs = [sum(flops.count(one)[:2]) for one in (dense, upcycle(dense, MoEConfig.clip_up(**moe)))]
    assert equal and all(run.steps == round(run.budget * costs[1] / costs[0]) for run in equal)
    assert all(run.why and (run.start is None or run.start in runs) for run in runs.values())


@pytest.mark.parametrize(("study", "dimensions"), [("lexicon", 16), ("memory", 384)])
def test_runs_that_train_the_image_tower_alone_cost_the_flops_of_their_budget_in_it(study, dimensions):
    runs = config.read(STUDIES / study)

    @functools.cache
    def gflops(model, moe=None):
        with factory.expecting_random_weights():
            one, *_ = factory.create_model_and_transforms(model, embed_dim=dimensions)
        return flops.count(one if moe is None else upcycle(one, moe)).image_gflops

    (experts,) = {run.moe_cfg for run in runs.values() if run.arm == "experts_16"}
    budget, start = gflops("clipup-icons-w16", experts), gflops("clipup-icons-w16")
    for run in runs.values():
        if run.budget:
            share = run.budget * (budget if run.start else budget + start)
            assert run.steps == round(share / gflops(run.model, run.moe_cfg))
        assert run.why and (run.start is None or run.start in runs)
    assert any(run.budget for run in runs.values())
