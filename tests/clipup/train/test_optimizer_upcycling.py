"""Optimizer state of a dense run, upcycled for the sparse model (arXiv 2212.05055)."""

import re

import pytest
import torch
from same_runs import assert_same_weights
from tiny_families import timm_model

import clipup
from clipup.train import train
from clipup.train.checkpoints.format import load
from clipup.train.optimizer.dense_moments import named_state
from clipup.train.optimizer.groups import create_optimizer
from clipup.train.parallel.whole_state import by_name, load_optimizer_state
from clipup.train.setup import build_model

MOE = clipup.MoEConfig(num_experts=4)
SHARDS = clipup.MoEConfig(num_experts=8, top_k=4, granularity=2, shared_expert=True)
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture
def dense_run(make_model, pairs, options):
    """The checkpoint of a short dense run."""
    return train(options(name="dense", steps=3), model=make_model(), loader=pairs()).directory / (
        "checkpoints/epoch_latest.pt"
    )


def state_after(options, model, dense_run, moe=MOE):
    """Model and optimizer state, by name, of a run that starts from the dense one, before its first step."""
    settings = options(moe=True, moe_cfg=moe, resume_dense=str(dense_run), logs=None)
    built = build_model(settings.model, settings.transforms, moe, torch.device("cpu"), "fp32", model)
    optimizer = create_optimizer(built.model, settings.optimizer)
    load_optimizer_state(optimizer, built.model, built.optimizer_state)
    return built.model, by_name(optimizer.state_dict())


def test_all_but_routers_get_weights_moments_and_step_of_what_they_are_copied_from(make_model, options, dense_run):
    dense = load(dense_run)
    moments = named_state(make_model(), dense["optimizer"], "dense")

    model, state = state_after(options, make_model(seed=5), dense_run)

    routers = {name for name, _ in model.named_parameters() if name.endswith("router.weight")}
    assert set(state) == {name for name, _ in model.named_parameters()} - routers and routers
    assert all(values["step"] == 3 for values in state.values())
    parts = {"in": "c_fc", "out": "c_proj"}
    weights = model.state_dict()
    for name in state:
        source = re.sub(r"(?<=\.mlp\.)(in|out)_(\w+)$", lambda part: f"{parts[part[1]]}.{part[2]}", name)
        assert torch.equal(weights[name], dense["state_dict"][source].expand_as(weights[name]))
        for key in MOMENTS:
            assert torch.equal(state[name][key], moments[source][key].expand_as(weights[name])), (name, key)


def test_shards_get_their_part_of_the_moments_and_the_whole_output_bias(make_model, options, dense_run):
    moments = named_state(make_model(), load(dense_run)["optimizer"], "dense")

    model, state = state_after(options, make_model(), dense_run, SHARDS)

    for name in clipup.moe_layers(model):
        for key in MOMENTS:
            of_in, of_bias = (moments[f"{name}.{part}"][key] for part in ("c_fc.weight", "c_proj.bias"))
            assert torch.equal(state[f"{name}.in_weight"][key][3], of_in[len(of_in) // 2 :])
            torch.testing.assert_close(state[f"{name}.out_bias"][key], of_bias.expand(8, -1))
            assert torch.equal(state[f"{name}.shared.in_weight"][key][0], of_in)


def test_a_run_from_a_dense_checkpoint_resumes_and_reinitialized_weights_are_refused(
    make_model, pairs, options, dense_run
):
    def run(**changes):
        settings = {"moe": True, "moe_cfg": MOE, "resume_dense": str(dense_run), "lr_scheduler": "const", **changes}
        return train(options(**settings), model=make_model(), loader=pairs())

    whole = run(name="whole", steps=4)
    run(steps=2)
    resumed = run(steps=4, resume="latest")

    assert_same_weights(whole, resumed)
    with pytest.raises(ValueError, match="reinit_ratio"):
        run(name="other", moe_cfg=MOE.replace(reinit_ratio=0.5))


def test_optimizers_of_other_kinds_or_models_are_refused(make_model, dense_run):
    optimizer = load(dense_run)["optimizer"]
    for group in optimizer["param_groups"]:  # as open_clip_train saves it
        del group["param_names"]
    with pytest.raises(ValueError):
        named_state(timm_model("Block/Mlp"), optimizer, "run.pt")
    del optimizer["state"][optimizer["param_groups"][1]["params"][0]]["exp_avg"]
    with pytest.raises(ValueError, match="run.pt is not an AdamW"):
        named_state(make_model(), optimizer, "run.pt")
