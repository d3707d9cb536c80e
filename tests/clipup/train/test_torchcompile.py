"""A compiled training step gives the losses of an eager one."""

from __future__ import annotations

import pytest
import torch

import clipup
from clipup.train import train

SPARSE = clipup.MoEConfig.clip_up(num_experts=4, selection_bias="sign", local_entropy_weight=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("backend, checkpointing", [("aot_eager", True), ("aot_eager", False), ("inductor", False)])
def test_a_compiled_sparse_step_gives_the_eager_losses_weights_and_selection_biases(
    make_model, pairs, options, backend, checkpointing
):
    torch.compiler.reset()
    runs = []
    for compiled in ({}, {"torchcompile": True, "torchcompile_backend": backend}):
        usual = {"logs": None, "steps": 3, "warmup": 0, "eps": 1e-3, "grad_checkpointing": checkpointing}
        loader = pairs(pairs=8, batch_size=4)
        runs.append(train(options(**usual, **compiled), model=make_model(SPARSE), loader=loader))
    eager, compiled = runs

    for name in ("contrastive", "aux"):
        losses = [[record[name] for record in run.history] for run in runs]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][0] > 0
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    biases = [layer.router.selection_bias for layer in clipup.moe_layers(compiled.model).values()]
    assert all(bias.abs().max() > 0 for bias in biases)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()
