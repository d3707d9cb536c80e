"""Locked towers, and training of routers or experts alone."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
import torch
from tiny_families import bert_config, build, hugging_face_cfg

import clipup
from clipup.train import train
from clipup.train.optim import lock_parts

SPARSE = clipup.MoEConfig(num_experts=4, balance_weight=0.01, z_weight=1e-3, selection_bias="sign")
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 10, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.fixture
def changes(make_model, pairs, options):
    """Trains a sparse model, and returns the names of what has changed in it, selection biases included."""

    def run(config=SPARSE, **settings):
        model = make_model(config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(options(logs=None, steps=2, warmup=0, **settings), model=model, loader=pairs())
        return changed(before, model), set(before)

    return run


@pytest.mark.parametrize("settings", [{}, {"accum_freq": 2}, {"grad_checkpointing": True}, {"precision": "amp_bf16"}])
def test_a_locked_image_tower_keeps_its_experts_routers_and_selection_biases(changes, settings):
    moved, names = changes(lock_image=True, **settings)

    assert moved == {name for name in names if not name.startswith("visual.")} - {"attn_mask"}


def test_unlocked_groups_are_counted_from_the_projection(changes):
    image = {name for name in changes(lock_image=True, lock_image_unlocked_groups=2)[0] if name.startswith("visual.")}
    text = changes(lock_text=True, lock_text_unlocked_layers=1)[0]

    last = "visual.transformer.resblocks.1."
    assert {name for name in image if not name.startswith(last)} == {
        "visual.proj",
        "visual.ln_post.weight",
        "visual.ln_post.bias",
    }
    assert {f"{last}mlp.router.weight", f"{last}mlp.in_weight", f"{last}mlp.router.selection_bias"} <= image
    assert {name for name in text if not name.startswith("visual.")} == {"text_projection", "logit_scale"}


@pytest.mark.parametrize("towers", [("image", "text"), ("text",)])
def test_training_can_be_of_routers_or_experts_alone(changes, towers):
    config = dataclasses.replace(SPARSE, towers=towers, shared_expert=True)

    def kinds(train_only):
        return {name.partition(".mlp.")[2] for name in changes(config, train_only=train_only)[0]}

    routers = {"router.weight", "router.selection_bias"}
    experts = {
        f"{shared}{part}" for shared in ("", "shared.") for part in ("in_weight", "in_bias", "out_weight", "out_bias")
    }
    assert kinds("routers") == routers
    assert kinds("experts") == experts
    assert kinds("sparse_layers") == routers | experts


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3])
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_locked_parameters_are_those_that_open_clip_locks(options, custom, unlocked):
    ours, theirs = (
        build({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": custom}) for _ in "ab"
    )
    counts = {"lock_image_unlocked_groups": unlocked, "lock_text_unlocked_layers": unlocked}

    lock_parts(ours, options(lock_image=True, lock_text=True, **counts))
    theirs.lock_image_tower(unlocked)
    theirs.lock_text_tower(unlocked)

    assert trained(ours) == trained(theirs) < set(dict(ours.named_parameters()))


@pytest.mark.parametrize("freeze", [False, True])
def test_layer_norms_of_a_locked_hugging_face_tower_are_trained_unless_they_are_frozen(options, tmp_path, freeze):
    model = build(hugging_face_cfg(bert_config("Bert"), tmp_path))

    lock_parts(model, options(lock_text=True, lock_text_unlocked_layers=1, lock_text_freeze_layer_norm=freeze))

    text = {name for name in trained(model) if name.startswith("text.")}
    head = {name for name in text if name.startswith(("text.proj.", "text.transformer.pooler."))}
    assert head and all("LayerNorm" in name for name in text - head) and bool(text - head) == (not freeze)


def test_what_is_locked_may_change_on_resume_and_moments_are_kept_by_name(make_model, pairs, options):
    usual = {"lr_scheduler": "const", "warmup": 0}
    first = train(options(steps=3, lock_image=True, **usual), model=make_model(SPARSE), loader=pairs())
    state = torch.load(first.directory / "checkpoints" / "epoch_latest.pt", weights_only=True)["optimizer"]
    held = {name for group in state["param_groups"] for name in group["param_names"]}

    resumed = train(
        options(steps=6, lock_text=True, resume="latest", **usual), model=make_model(SPARSE, seed=1), loader=pairs()
    )

    after = torch.load(resumed.directory / "checkpoints" / "epoch_latest.pt", weights_only=True)["optimizer"]
    steps = {
        name: int(after["state"][at]["step"])
        for group in after["param_groups"]
        for name, at in zip(group["param_names"], group["params"], strict=True)
    }
    assert not any(name.startswith("visual.") for name in held)
    assert steps.pop("logit_scale") == 6
    assert set(steps.values()) == {3} and all(name.startswith("visual.") for name in steps)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_only": "routers"}, "train_only='routers' needs a sparse model, and this one is dense"),
        (
            {"lock_image": True, "lock_image_unlocked_groups": 4},
            "leaves nothing of the image tower locked, which has 4",
        ),
        ({"lock_text": True, "lock_text_unlocked_layers": 9}, "lock_text_unlocked_layers=9 leaves nothing of the text"),
    ],
)
def test_locks_that_cannot_be_set_are_refused(make_model, pairs, options, settings, message):
    with pytest.raises(ValueError, match=message):
        train(options(**settings), model=make_model(), loader=pairs())


@pytest.mark.parametrize("freeze", [False, True])
def test_batch_norm_statistics_of_a_locked_tower_can_be_frozen(pairs, options, freeze):
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg={**TEXT, "vocab_size": 49408, "context_length": 8})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [(torch.randn(4, 3, 32, 32), texts[:4]) for _, texts in pairs()]

    train(options(logs=None, steps=2, lock_image=True, lock_image_freeze_bn_stats=freeze), model=model, loader=loader)

    image = {name for name in changed(before, model) if name.startswith("visual.")}
    assert (image == set()) == freeze and all("running_" in name or "tracked" in name for name in image)
    assert set(model.state_dict()) == set(before)
