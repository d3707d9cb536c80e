"""Config files of runs: what they may say, and what the studies' own files say."""

from pathlib import Path

import pytest

from clipup.clip import flops
from clipup.models import factory
from clipup.moe.config import MoEConfig
from clipup.upcycling.upcycle import upcycle
from studies.runner import config

STUDIES = Path(__file__).parents[3] / "studies"
COMPLETE = "arm: clip_up\nmodel: clipup-icons-w64\nsteps: 10\nlr: 0.001\n"


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> config.StudyRun:
        (tmp_path / "a-run.yaml").write_text(text)
        return config.read(tmp_path / "a-run.yaml")

    return read


def test_a_config_names_its_run_by_its_file_and_changes_the_preset(read):
    run = read(COMPLETE + "moe: {num_experts: 4, blocks: [1]}\nstart: dense\n")
    assert (run.name, run.steps, run.lr, run.start) == ("a-run", 10, 0.001, "dense")
    assert run.moe_cfg == MoEConfig.clip_up(num_experts=4, blocks=(1,), towers=("image", "text"))
    assert read(COMPLETE + "moe: {}\n").moe_cfg == MoEConfig.clip_up(towers=("image", "text"))
    assert read(COMPLETE).moe_cfg is None


@pytest.mark.parametrize(
    "text, names",
    [
        (COMPLETE + "learning_rate: 1\n", "learning_rate"),
        ("arm: dense\nsteps: 10\n", "'model' and 'lr'"),
        (COMPLETE + "moe: {num_experts: 0}\n", "num_experts"),
        (COMPLETE + "others: [a]\nmoe: {}\n", "others and clusters"),
        (COMPLETE + "clusters: true\nstart: a\n", "others and clusters"),
    ],
)
def test_what_a_config_gets_wrong_is_named(read, text, names):
    with pytest.raises((ValueError, TypeError), match=rf"a-run\.yaml: .*{names}"):
        read(text)


@pytest.mark.parametrize("study", ["icons", "icons-w384", "converged", "converged_rate", "scenes"])
def test_runs_of_a_study_are_called_what_they_are_and_cost_what_their_arm_says(study):
    runs = [config.read(path) for path in (STUDIES / study).glob("*.yaml")]
    (model,) = {run.model for run in runs}
    dense = factory.create_on_meta(model)
    costs = [sum(flops.count(one)[:2]) for one in (dense, upcycle(dense, MoEConfig.clip_up()))]
    equal = [run for run in runs if run.arm == "dense_equal_flops"]
    assert equal and all(run.steps == round(run.budget * costs[1] / costs[0]) for run in equal)
    names = {run.name for run in runs}
    for run in runs:
        assert set(run.needed) <= names
        assert run.name.startswith(f"{run.arm}-{run.steps}-lr{run.lr:g}-")
        assert run.name.endswith(f"-s{run.seed}") and run.why
