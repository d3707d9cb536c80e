"""Optimizers by name, groups of parameters, layer decay, and optimizers on resume."""

from __future__ import annotations

import pytest
import timm.optim
import torch

import clipup
from clipup.train import train
from clipup.train.optim import (
    base_lr,
    create_optimizer,
    groups_of,
    load_optimizer_state,
    optimizer_state,
    schedule,
)

SPARSE = clipup.MoEConfig(num_experts=4)


def named_groups(model, options):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [({names[one] for one in group["params"]}, group) for group in groups_of(model, options)]


@pytest.mark.parametrize("opt", ["nadamw", "timm/lion", "timm/sgd", "timm/adamp"])
def test_optimizers_of_torch_and_timm_train_and_resume_bitwise(make_model, pairs, options, opt):
    settings = {"opt": opt, "lr": 1e-3, "save_every_n_steps": 4, "wd_exclude": ("*router*",)}

    def stop(_):
        raise KeyboardInterrupt

    whole = train(options(name="whole", **settings), model=make_model(SPARSE), loader=pairs())
    with pytest.raises(KeyboardInterrupt):
        train(options(**settings), model=make_model(SPARSE), loader=pairs(), callbacks=[clipup.train.Every(5, stop)])
    resumed = train(options(resume="latest", **settings), model=make_model(SPARSE, seed=1), loader=pairs())

    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_optimizer_of_timm_gets_the_groups_and_the_given_arguments(make_model, options):
    model = make_model(SPARSE)
    settings = options(opt="timm/adabelief", wd=0.3, beta1=0.8, beta2=0.9, eps=1e-4, opt_kwargs={"rectify": False})

    optimizer = create_optimizer(model, settings)

    free, decayed = optimizer.param_groups
    assert isinstance(optimizer, timm.optim.AdaBelief)
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.3)
    assert decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-4 and not optimizer.defaults["rectify"]
    assert len(free["params"]) + len(decayed["params"]) == len(list(model.parameters()))
    momentum = create_optimizer(model, options(opt="timm/sgd", momentum=0.7)).param_groups[0]["momentum"]
    assert momentum == 0.7


def test_defaults_of_the_betas_are_clips_for_adamw_and_timms_own_for_timm(make_model, options):
    ours = create_optimizer(make_model(), options()).defaults
    lion = create_optimizer(make_model(), options(opt="timm/lion")).defaults

    assert (ours["betas"], ours["eps"]) == ((0.9, 0.98), 1e-6) and lion["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"opt": "timm/adamm"}, "adamm"),
        ({"wd_exclude": ("router",)}, "wd_exclude"),
        ({"moe_lr_scale": 2.0}, "moe_lr_scale"),
    ],
)
def test_optimizers_that_cannot_be_created_are_refused_by_name(make_model, options, changes, name):
    with pytest.raises(ValueError, match=name):
        create_optimizer(make_model(), options(**changes))


def test_patterns_exclude_parameters_from_weight_decay(make_model, options):
    model = make_model(SPARSE)
    (free, _), (decayed, _) = named_groups(model, options(wd_exclude=("*.router.weight", "*positional_embedding")))
    usual = named_groups(model, options())[1][0]

    excluded = usual - decayed
    assert {name.rpartition(".resblocks.")[2] or name for name in excluded} == {
        "1.mlp.router.weight",
        "positional_embedding",
        "visual.positional_embedding",
    }
    assert free | decayed == set(dict(model.named_parameters()))


def test_layer_decay_lowers_the_learning_rate_with_the_depth_of_the_tower(make_model, options):
    model = make_model(SPARSE)
    groups = named_groups(model, options(image_layer_decay=0.5, text_layer_decay=0.1, lr=1.0))
    scale = {name: group["lr_scale"] for names, group in groups for name in names}
    decay = {name: group["weight_decay"] for names, group in groups for name in names}

    assert scale["logit_scale"] == scale["visual.proj"] == scale["text_projection"] == 1
    assert scale["visual.ln_post.weight"] == scale["visual.transformer.resblocks.1.mlp.in_weight"] == 0.5
    assert scale["visual.transformer.resblocks.0.mlp.c_fc.weight"] == 0.25 and scale["visual.conv1.weight"] == 0.125
    assert scale["transformer.resblocks.1.mlp.router.weight"] == pytest.approx(0.1)
    assert scale["token_embedding.weight"] == pytest.approx(1e-3)
    usual = {name: group["weight_decay"] for names, group in named_groups(model, options()) for name in names}
    assert decay == usual
    assert [group["lr_scale"] for _, group in groups] == sorted((g["lr_scale"] for _, g in groups), reverse=True)


def test_routers_and_experts_may_have_another_learning_rate(make_model, options):
    model = make_model(SPARSE)
    groups = named_groups(model, options(moe_lr_scale=4.0, text_layer_decay=0.5, lr=1.0))
    scale = {name: group["lr_scale"] for names, group in groups for name in names}

    sparse = "visual.transformer.resblocks.1.mlp."
    assert scale[f"{sparse}in_weight"] == scale[f"{sparse}router.weight"] == scale[f"{sparse}out_bias"] == 4
    assert scale["transformer.resblocks.1.mlp.in_weight"] == 4 * scale["transformer.resblocks.1.ln_1.weight"] == 2
    assert scale["visual.transformer.resblocks.0.mlp.c_fc.weight"] == scale["visual.proj"] == 1
    usual = {name: group["weight_decay"] for names, group in named_groups(model, options()) for name in names}
    assert {name: group["weight_decay"] for names, group in groups for name in names} == usual


@pytest.mark.parametrize(("before", "now"), [(10.0, 1.0), (1.0, 10.0), (10.0, 0.1)])
def test_another_scale_on_resume_is_the_only_one_from_then_on(make_model, options, before, now):
    model, chosen = make_model(SPARSE), options(moe_lr_scale=now, warmup=0, lr_scheduler="const")
    state = optimizer_state(create_optimizer(model, options(moe_lr_scale=before)), model)
    optimizer = create_optimizer(model, chosen)

    load_optimizer_state(optimizer, model, state)
    schedule(chosen, optimizer, 6, 6)(3)

    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[one]: group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert rates["visual.proj"] == rates["logit_scale"] == pytest.approx(1e-3)
    assert rates["visual.transformer.resblocks.1.mlp.router.weight"] == pytest.approx(1e-3 * now)
    assert base_lr(optimizer) == pytest.approx(1e-3)


@pytest.mark.parametrize("skip", [False, True], ids=["scheduled", "constant"])
def test_every_step_applies_the_scaled_learning_rates(make_model, pairs, options, skip):
    moves = {}
    for decay in (None, 0.5):
        model = make_model()
        before = {name: value.clone() for name, value in model.named_parameters()}
        settings = {"opt": "timm/sgd", "momentum": 0.0, "wd": 0.0, "steps": 1, "warmup": 2, "logs": None}
        settings |= {"opt_kwargs": {"nesterov": False}, "skip_scheduler": skip, "lr": 1e-2}
        result = train(options(**settings, image_layer_decay=decay), model=model, loader=pairs())
        moves[decay] = {name: value.detach() - before[name] for name, value in model.named_parameters()}
        assert result.history[0]["lr"] == pytest.approx(1e-2 if skip else 5e-3)

    for name, scale in (("visual.proj", 1), ("visual.ln_post.bias", 0.5), ("visual.conv1.weight", 0.125)):
        torch.testing.assert_close(moves[0.5][name], scale * moves[None][name], rtol=1e-3, atol=1e-7)
