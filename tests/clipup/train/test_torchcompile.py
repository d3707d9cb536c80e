"""A compiled training step gives the losses of an eager one."""

from __future__ import annotations

import pytest
import torch

import clipup
from clipup.train import train

SPARSE = clipup.MoEConfig.clip_up(num_experts=4, selection_bias="sign", local_entropy_weight=0.01)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compare(make_model, pairs, options):
    """Trains eagerly and compiled, and compares losses, selection biases and weights."""

    def compare(config=SPARSE, backend="aot_eager", **changes):
        runs = []
        for compiled in ({}, {"torchcompile": True, "torchcompile_backend": backend}):
            usual = {"logs": None, "steps": 3, "warmup": 0, "eps": 1e-3}
            loader = pairs(pairs=8, batch_size=4)
            runs.append(train(options(**usual, **changes, **compiled), model=make_model(config), loader=loader))
        eager, compiled = runs
        for name in ("contrastive", "aux"):
            losses = [[record[name] for record in run.history] for run in runs]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4), name
        assert (eager.history[0]["aux"] > 0) == (config is not None)
        for name, value in eager.model.state_dict().items():
            torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
        return compiled

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_compiled_sparse_step_gives_the_eager_losses_and_selection_biases(compare, checkpointing):
    compiled = compare(grad_checkpointing=checkpointing)

    biases = [layer.router.selection_bias for layer in clipup.moe_layers(compiled.model).values()]
    assert all(bias.abs().max() > 0 for bias in biases)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_inductor_compiles_a_sparse_step(compare):
    compare(backend="inductor")


@pytest.mark.parametrize(
    "name, changes",
    [
        ("nothing", {"torchcompile_backend": "nothing"}),
        ("fastest", {"torchcompile_mode": "fastest"}),
    ],
)
def test_backends_and_modes_that_do_not_exist_are_refused(make_model, pairs, options, name, changes):
    with pytest.raises((ValueError, RuntimeError), match=name):
        train(options(torchcompile=True, **changes), model=make_model(), loader=pairs())
