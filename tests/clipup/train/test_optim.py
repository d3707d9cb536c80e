"""Optimizers by name, groups of parameters, layer decay, schedules, locked parts, and all of it on resume."""

import open_clip
import open_clip_train.scheduler
import pytest
import timm.optim
import torch
from same_runs import Killed, assert_same_run, killed
from tiny_families import bert_config, build, hugging_face_cfg

import clipup
from clipup.train import train
from clipup.train.optimizer.groups import create_optimizer, groups_of
from clipup.train.optimizer.locks import lock_parts
from clipup.train.optimizer.schedule import Schedule
from clipup.train.parallel.whole_state import load_optimizer_state, optimizer_state

SPARSE = clipup.MoEConfig(num_experts=4, balance_weight=0.01, z_weight=1e-3, selection_bias="sign")
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def named_groups(model, options):
    return [(set(group["param_names"]), group) for group in groups_of(model, options.optimizer)]


def by_name(groups, key):
    return {name: group.get(key) for names, group in groups for name in names}


@pytest.mark.parametrize("opt", ["nadamw", "timm/sgd", "timm/adamp", "timm/lookahead_adamw"])
def test_optimizers_of_torch_and_timm_train_and_resume_bitwise(make_model, pairs, options, opt):
    settings = {"opt": opt, "lr": 1e-3, "save_every_n_steps": 2, "wd_exclude": ("*router*",), "steps": 4}

    whole = train(options(name="whole", **settings), model=make_model(SPARSE), loader=pairs())
    with pytest.raises(Killed):
        train(options(**settings), model=make_model(SPARSE), loader=pairs(), callbacks=[clipup.train.Every(3, killed)])
    resumed = train(options(resume="latest", **settings), model=make_model(SPARSE, seed=1), loader=pairs())

    assert_same_run(whole, resumed)


def test_scalars_of_an_optimizer_keep_their_type_in_a_bfloat16_model():
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    model.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def optimizer():
        return torch.optim.NAdam([{"params": list(model.parameters()), "param_names": ["scale", "weight", "bias"]}])

    trained, resumed = optimizer(), optimizer()
    for _ in range(3):
        (model.scale * model(torch.ones(1, 3, dtype=torch.bfloat16)).sum()).backward()
        trained.step()
    load_optimizer_state(resumed, model, optimizer_state(trained, model))
    torch.testing.assert_close(resumed.state_dict()["state"], trained.state_dict()["state"], rtol=0, atol=0)
    assert resumed.state[model.scale]["mu_product"] is not trained.state[model.scale]["mu_product"]


def test_optimizers_get_the_groups_the_given_arguments_and_clips_or_their_own_defaults(make_model, options):
    model = make_model(SPARSE)
    given = {"wd": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-4, "opt_kwargs": {"rectify": False}}
    optimizer = create_optimizer(model, options(opt="timm/adabelief", **given).optimizer)

    free, decayed = optimizer.param_groups
    assert isinstance(optimizer, timm.optim.AdaBelief) and not optimizer.defaults["rectify"]
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.3)
    assert decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-4
    assert create_optimizer(model, options(opt="timm/sgd", momentum=0.7).optimizer).param_groups[0]["momentum"] == 0.7
    for opt, betas in (("adamw", (0.9, 0.98)), ("nadamw", (0.9, 0.98)), ("timm/lion", (0.9, 0.99))):
        assert create_optimizer(model, options(opt=opt).optimizer).defaults["betas"] == betas
    adamw = create_optimizer(model, options(beta1=0.5, opt_kwargs={"amsgrad": True}).optimizer).defaults
    assert (adamw["betas"], adamw["eps"], adamw["amsgrad"]) == ((0.5, 0.98), 1e-6, True)


def test_matrices_decay_and_norms_biases_scales_and_what_patterns_exclude_do_not(make_model, options):
    model = make_model(SPARSE, init_logit_bias=-10)
    (free, _), (decayed, _) = named_groups(model, options(wd_exclude=("*.router.weight", "*positional_embedding")))
    usual = named_groups(model, options())[1][0]

    assert {name.rpartition(".resblocks.")[2] or name for name in usual - decayed} == {
        "1.mlp.router.weight",
        "positional_embedding",
        "visual.positional_embedding",
    }
    assert free | decayed == set(dict(model.named_parameters()))
    assert {"logit_scale", "logit_bias", "ln_final.weight", "visual.ln_post.bias"} <= free
    assert {"token_embedding.weight", "visual.proj", "transformer.resblocks.0.mlp.c_fc.weight"} <= decayed


def test_learning_rates_fall_with_the_depth_of_a_tower_and_may_differ_for_routers_and_experts(make_model, options):
    model = make_model(SPARSE)
    groups = named_groups(model, options(image_layer_decay=0.5, text_layer_decay=0.1, moe_lr_scale=4.0, lr=1.0))
    scale = by_name(groups, "lr_scale")

    assert scale["logit_scale"] == scale["visual.proj"] == scale["text_projection"] == 1
    assert scale["visual.ln_post.weight"] == 0.5 and scale["visual.transformer.resblocks.1.mlp.in_weight"] == 4 * 0.5
    assert scale["visual.transformer.resblocks.0.mlp.c_fc.weight"] == 0.25 and scale["visual.conv1.weight"] == 0.125
    assert scale["transformer.resblocks.1.mlp.router.weight"] == pytest.approx(4 * 0.1)
    assert scale["token_embedding.weight"] == pytest.approx(1e-3)
    assert by_name(groups, "weight_decay") == by_name(named_groups(model, options()), "weight_decay")
    order = [group["lr_scale"] for _, group in groups]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("kind, warmup", [("cosine", 7), ("const", 0), ("const-cooldown", 7)])
def test_schedules_equal_those_of_open_clip_train(options, kind, warmup):
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cooldown = {"epochs_cooldown": 2, "lr_cooldown_end": 1e-5, "lr_cooldown_power": 1.5} if "cooldown" in kind else {}
    schedule = Schedule(options(lr=3e-4, warmup=warmup, lr_scheduler=kind, steps=31, **cooldown).optimizer, 6)
    if cooldown:
        set_theirs = open_clip_train.scheduler.const_lr_cooldown(theirs, 3e-4, warmup, 31, 12, 1.5, 1e-5)
    else:
        set_theirs = getattr(open_clip_train.scheduler, f"{kind}_lr")(theirs, 3e-4, warmup, 31)

    for step in range(31):
        set_theirs(step)
        assert schedule.rate(step) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


def changed(model, loader, chosen):
    """The names of what a run changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(chosen, model=model, loader=loader)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


PARTS = {"in_weight", "in_bias", "out_weight", "out_bias"}
ROUTERS, EXPERTS = {"router.weight", "router.selection_bias"}, PARTS | {f"shared.{part}" for part in PARTS}


@pytest.mark.parametrize(
    "train_only, parts", [("routers", ROUTERS), ("experts", EXPERTS), ("sparse_layers", ROUTERS | EXPERTS)]
)
def test_training_can_be_of_routers_or_experts_alone(make_model, pairs, options, train_only, parts):
    model = make_model(SPARSE.replace(towers=("text",), shared_expert=True))
    found = changed(model, pairs(), options(logs=None, steps=2, warmup=0, train_only=train_only))
    assert {name.partition(".mlp.")[2] for name in found} == parts


def test_a_locked_image_tower_keeps_its_experts_routers_and_selection_biases(make_model, pairs, options):
    model = make_model(SPARSE)
    found = changed(model, pairs(), options(logs=None, steps=2, warmup=0, lock_image=True, accum_freq=2))
    assert found == {name for name in model.state_dict() if not name.startswith("visual.")} - {"attn_mask"}


def test_a_sparse_layer_without_a_trained_parameter_evaluates_until_it_is_trained_again(make_model, pairs, options):
    model = make_model(SPARSE.replace(router_noise=1.0, capacity_factor=0.5, eval_capacity_factor=None))
    history = train(options(logs=None, steps=2, lock_image=True), model=model, loader=pairs()).history
    dropped = {name: layer["dropped"] for name, layer in history[-1]["layers"].items()}
    assert {name.startswith("visual.") for name in dropped} == {True, False}
    assert all((value == 0) == name.startswith("visual.") for name, value in dropped.items())
    unlocked = clipup.moe_layers(model.requires_grad_(True).train())
    model(*next(iter(pairs())))
    assert all(values["dropped"] > 0 for values in clipup.moe_metrics(model).values())
    assert all(layer.training for layer in unlocked.values())


@pytest.mark.parametrize("custom, unlocked", [(False, 0), (True, 1), (False, 2), (True, 3)])
def test_locked_parameters_are_those_that_open_clip_locks(options, custom, unlocked):
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": custom}
    ours, theirs = (build(config) for _ in "ab")
    counts = {"lock_image_unlocked_groups": unlocked, "lock_text_unlocked_layers": unlocked}

    lock_parts(ours, options(lock_image=True, lock_text=True, **counts).trained_parts)
    theirs.lock_image_tower(unlocked)
    theirs.lock_text_tower(unlocked)

    assert trained(ours) == trained(theirs) < set(dict(ours.named_parameters()))


@pytest.mark.parametrize("freeze", [False, True])
def test_layer_norms_of_a_locked_hugging_face_tower_are_trained_unless_they_are_frozen(options, tmp_path, freeze):
    model = build(hugging_face_cfg(bert_config("Bert"), tmp_path))

    lock_parts(
        model, options(lock_text=True, lock_text_unlocked_layers=1, lock_text_freeze_layer_norm=freeze).trained_parts
    )

    text = {name for name in trained(model) if name.startswith("text.")}
    head = {name for name in text if name.startswith(("text.proj.", "text.transformer.pooler."))}
    assert head and all("LayerNorm" in name for name in text - head) and bool(text - head) == (not freeze)


@pytest.mark.parametrize("freeze", [False, True])
def test_batch_norm_statistics_of_a_locked_tower_can_be_frozen(pairs, options, freeze):
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)
    loader = [(torch.randn(4, 3, 32, 32), texts[:4]) for _, texts in pairs()]
    found = changed(model, loader, options(logs=None, steps=2, lock_image=True, lock_image_freeze_bn_stats=freeze))
    image = {name for name in found if name.startswith("visual.")}
    assert (image == set()) == freeze and all("running_" in name or "tracked" in name for name in image)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"opt": "timm/adamm"}, "adamm"),
        ({"opt_kwargs": {"amsgrd": True}}, "opt_kwargs.*amsgrd"),
        ({"opt": "timm/rmsprop", "opt_kwargs": {"centred": True}}, "opt_kwargs.*centred"),
        ({"wd_exclude": ("router",)}, "wd_exclude"),
        ({"moe_lr_scale": 2.0}, "moe_lr_scale"),
        ({"train_only": "routers"}, "train_only"),
        ({"lock_image": True, "lock_image_unlocked_groups": 4}, "lock_image_unlocked_groups=4"),
        ({"lock_text": True, "lock_text_unlocked_layers": 9}, "lock_text_unlocked_layers=9"),
    ],
)
def test_optimizers_and_locks_that_a_dense_model_cannot_have_are_refused_by_name(make_model, options, changes, name):
    model, chosen = make_model(), options(**changes)
    with pytest.raises(ValueError, match=name):
        lock_parts(model, chosen.trained_parts)
        create_optimizer(model, chosen.optimizer)
