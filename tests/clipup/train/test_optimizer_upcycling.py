"""Optimizer state of a dense run, upcycled for the sparse model (arXiv 2212.05055)."""

from __future__ import annotations

import pytest
import torch
from tiny_families import TIMM, timm_model

import clipup
from clipup.train import train
from clipup.train.checkpoints.open_clip_format import load
from clipup.train.loop import Trainer
from clipup.train.optim import create_optimizer
from clipup.train.optimizer_upcycling import load_state, named_state, upcycled_state
from clipup.train.ranks.distributed import Ranks
from clipup.train.setup import build_model
from clipup.train.training_data import Epochs

MOE = clipup.MoEConfig(num_experts=4)
MOMENTS = ("exp_avg", "exp_avg_sq")
PROJECTIONS = (("in", "c_fc"), ("out", "c_proj"))


@pytest.fixture
def dense_run(make_model, pairs, options):
    """The checkpoint of a short dense run."""
    return train(options(name="dense", steps=3), model=make_model(), loader=pairs()).directory / (
        "checkpoints/epoch_latest.pt"
    )


def state_after(options, model, dense_run, moe=MOE, **changes):
    """Model and optimizer state, by name, of a run that starts from the dense one, before its first step."""
    settings = options(moe=True, moe_cfg=moe, resume_dense=str(dense_run), logs=None, **changes)
    ranks = Ranks(torch.device("cpu"))
    built = build_model(settings, ranks, "fp32", model)
    trainer = Trainer(settings, built, Epochs([None], 1), ranks, None, "fp32")
    names = {parameter: name for name, parameter in built.model.named_parameters()}
    return built.model, {names[parameter]: state for parameter, state in trainer.optimizer.state.items()}


def test_every_expert_gets_the_moments_of_the_weight_it_is_copied_from(make_model, options, dense_run):
    dense = load(dense_run)
    moments = named_state(make_model(), dense["optimizer"], "dense")

    model, state = state_after(options, make_model(seed=5), dense_run)

    pairs = {f"{ours}_{kind}": f"{theirs}.{kind}" for ours, theirs in PROJECTIONS for kind in ("weight", "bias")}
    layers = clipup.moe_layers(model)
    assert layers
    for name, layer in layers.items():
        for ours, theirs in pairs.items():
            assert torch.equal(getattr(layer, ours)[2], dense["state_dict"][f"{name}.{theirs}"])
            for key in MOMENTS:
                copies = state[f"{name}.{ours}"][key]
                assert copies.abs().max() > 0
                assert all(torch.equal(copy, moments[f"{name}.{theirs}"][key]) for copy in copies)


def test_dense_parameters_keep_their_moments_and_all_but_routers_their_step(make_model, options, dense_run):
    moments = named_state(make_model(), load(dense_run)["optimizer"], "dense")

    model, state = state_after(options, make_model(seed=5), dense_run)

    kept = [name for name in moments if name in state]
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in kept and "logit_scale" in kept
    for name in kept:
        assert all(torch.equal(state[name][key], moments[name][key]) for key in MOMENTS)
    routers = {name for name, _ in model.named_parameters() if name.endswith("router.weight")}
    assert set(state) == {name for name, _ in model.named_parameters()} - routers and routers
    assert all(values["step"] == 3 for values in state.values())


def test_first_step_moves_the_experts_as_the_dense_run_would_have_moved_the_mlp(make_model, pairs, options, dense_run):
    """Without any gradient Adam's step is that of its moments."""
    model, state = state_after(options, make_model(seed=5), dense_run)
    settings = options(lr=1e-2, wd=0.0)
    sparse_optimizer = create_optimizer(model, settings)
    load_state(sparse_optimizer, model, state)
    dense = make_model()
    checkpoint = load(dense_run)
    dense.load_state_dict(checkpoint["state_dict"])
    dense_optimizer = create_optimizer(dense, settings)
    dense_optimizer.load_state_dict(checkpoint["optimizer"])
    for group in dense_optimizer.param_groups:
        group.update(lr=1e-2, weight_decay=0.0)
    for each, optimizer in ((model, sparse_optimizer), (dense, dense_optimizer)):
        for parameter in each.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, layer in clipup.moe_layers(model).items():
        mlp = dense.get_submodule(name)
        assert (mlp.c_fc.weight - checkpoint["state_dict"][f"{name}.c_fc.weight"]).abs().max() > 1e-3
        for expert in layer.in_weight:
            torch.testing.assert_close(expert, mlp.c_fc.weight)


def test_shards_get_their_part_of_the_moments_and_the_whole_output_bias(make_model, options, dense_run):
    moe = clipup.MoEConfig(num_experts=8, top_k=4, granularity=2, shared_expert=True)
    moments = named_state(make_model(), load(dense_run)["optimizer"], "dense")

    model, state = state_after(options, make_model(), dense_run, moe)

    for name in clipup.moe_layers(model):
        for key in MOMENTS:
            of_in, of_bias = (moments[f"{name}.{part}"][key] for part in ("c_fc.weight", "c_proj.bias"))
            assert torch.equal(state[f"{name}.in_weight"][key][3], of_in[64:])
            torch.testing.assert_close(state[f"{name}.out_bias"][key], of_bias.expand(8, -1))
            assert torch.equal(state[f"{name}.shared.in_weight"][key][0], of_in)


@pytest.mark.parametrize("family", TIMM)
def test_in_every_family_all_but_routers_get_moments_of_their_shape(family):
    dense = timm_model(family)
    state = {
        name: {"step": torch.tensor(7.0), **{key: torch.rand_like(parameter) for key in MOMENTS}}
        for name, parameter in dense.named_parameters()
    }
    moe = clipup.MoEConfig(num_experts=2, blocks="every", towers=("image",), shared_expert=True)

    carried = upcycled_state(dense, moe, state)

    sparse = dict(clipup.upcycle(dense, moe).named_parameters())
    assert set(carried) == {name for name in sparse if not name.endswith("router.weight")}
    for name, values in carried.items():
        assert all(values[key].shape == sparse[name].shape and values[key].min() < values[key].max() for key in MOMENTS)


def test_a_run_from_a_dense_checkpoint_trains_and_resumes(make_model, pairs, options, dense_run):
    settings = {"moe": True, "moe_cfg": MOE, "resume_dense": str(dense_run), "lr_scheduler": "const"}
    whole = train(options(**settings, name="whole", steps=6), model=make_model(), loader=pairs())
    train(options(**settings, steps=3), model=make_model(), loader=pairs())

    resumed = train(options(**settings, steps=6, resume="latest"), model=make_model(), loader=pairs())

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_weights_that_are_drawn_again_and_optimizers_of_other_kinds_are_refused(make_model, options, dense_run):
    with pytest.raises(ValueError, match="reinit_ratio"):
        state_after(options, make_model(), dense_run, MOE.replace(reinit_ratio=0.5))
    optimizer = load(dense_run)["optimizer"]
    del optimizer["state"][optimizer["param_groups"][1]["params"][0]]["exp_avg"]
    with pytest.raises(ValueError, match="run.pt is not an AdamW"):
        named_state(make_model(), optimizer, "run.pt")
    for group in optimizer["param_groups"]:  # as open_clip_train saves it
        del group["param_names"]
    with pytest.raises(ValueError):
        named_state(timm_model("Block/Mlp"), optimizer, "run.pt")


def test_weights_of_another_activation_or_tokenizer_are_not_upcycled(named_model, options, pairs):
    run = train(options(model=named_model, name="dense", steps=1, force_quick_gelu=True), loader=pairs())
    path = run.directory / "checkpoints" / "epoch_latest.pt"
    sparse = {"model": named_model, "name": "sparse", "steps": 1, "moe": True, "resume_dense": str(path)}

    with pytest.raises(ValueError, match=r"epoch_latest.pt was trained as another model .* describes 'QuickGELU'"):
        train(options(**sparse), loader=pairs())
    torch.save(load(path) | {"tokenizer_files": {"vocab.txt": ""}}, path)
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        train(options(**sparse, force_quick_gelu=True), loader=pairs())
    torch.save(load(path) | {"tokenizer_files": {}}, path)
    assert train(options(**sparse, force_quick_gelu=True), loader=pairs()).steps == 1
