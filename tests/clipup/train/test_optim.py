"""Which parameters decay, and the learning rate schedules."""

from __future__ import annotations

import open_clip_train.scheduler
import pytest
import torch

import clipup
from clipup import parameter_groups
from clipup.train.optim import schedule


def test_matrices_decay_and_norms_biases_and_the_logit_scale_do_not(make_model):
    model = make_model(clipup.MoEConfig(num_experts=4), init_logit_bias=-10)

    free, decayed = parameter_groups(model, 0.2)

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free_names = {names[id(parameter)] for parameter in free["params"]}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert (free["weight_decay"], decayed["weight_decay"]) == (0.0, 0.2)
    assert free_names | decayed_names == set(names.values()) and not free_names & decayed_names
    assert {"logit_scale", "logit_bias", "ln_final.weight", "visual.ln_post.bias"} <= free_names
    assert {"token_embedding.weight", "visual.proj", "transformer.resblocks.0.mlp.c_fc.weight"} <= decayed_names


@pytest.mark.parametrize("kind", ["cosine", "const", "const-cooldown"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_those_of_open_clip_train(options, kind, warmup):
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0) for _ in range(2))
    cooldown = {"epochs_cooldown": 2, "lr_cooldown_end": 1e-5, "lr_cooldown_power": 1.5} if "cooldown" in kind else {}
    set_lr = schedule(options(lr=3e-4, warmup=warmup, lr_scheduler=kind, **cooldown), ours, 31, 6)
    if cooldown:
        set_theirs = open_clip_train.scheduler.const_lr_cooldown(theirs, 3e-4, warmup, 31, 12, 1.5, 1e-5)
    else:
        set_theirs = getattr(open_clip_train.scheduler, f"{kind}_lr")(theirs, 3e-4, warmup, 31)

    for step in range(31):
        set_lr(step)
        set_theirs(step)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
