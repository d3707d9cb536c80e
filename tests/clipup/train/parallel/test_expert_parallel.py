"""Layers whose experts are DTensors sharded over ranks compute what layers with all experts compute."""

import expert_parallel_layers
import pytest
import torch
from rank_processes import on_ranks

pytestmark = pytest.mark.slow
RANKS = 2
TOLERANCES = {"bfloat16": 2e-2, "autocast": 2e-2, "float64": 1e-12}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Errors by case, a list over ranks."""
    out = tmp_path_factory.mktemp("layers")
    on_ranks(out, RANKS, expert_parallel_layers.run, out)
    of_rank = [torch.load(out / f"errors-{rank}.pt") for rank in range(RANKS)]
    return {name: [of[name] for of in of_rank] for name in of_rank[0]}


OTHER_USES = ("checkpointed", "compiled", "no tokens on some ranks", "masked tokens", "autocast")


@pytest.mark.parametrize(
    "case", [*expert_parallel_layers.LAYERS, *OTHER_USES, "replicated", "other axis", "the manual's loop"]
)
def test_outputs_and_gradients_are_those_of_one_process(errors, case):
    assert max(errors[case]) < TOLERANCES.get(case, 1e-5)
