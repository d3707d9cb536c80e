"""A model is loaded and saved with the config that it was created with, or is refused: weights of another function fit
too."""

import pytest
import torch
from tiny_clip import CONFIGS, tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, save_pretrained, step0_difference, upcycle
from clipup.models.architecture import differing

NAME = "clipup-tiny-32"


def changed(config, **fields):
    """A config with fields such as vision_cfg__head_width changed."""
    for name, value in fields.items():
        *towers, field = name.split("__")
        (config[towers[0]] if towers else config)[field] = value
    return config


OTHERS = {
    "activation": {"quick_gelu": True},
    "heads of the image tower": {"vision_cfg__head_width": 16},
    "heads of the text tower": {"text_cfg__heads": 4},
    "mask": {"text_cfg__no_causal_mask": True},
    "pooling": {"vision_cfg__pool_type": "avg"},
    "norms": {"text_cfg__norm_kwargs": {"eps": 1e-3}},
    "image size": {"vision_cfg__image_size": 64},
    "context length": {"text_cfg__context_length": 6},
    "layers": {"vision_cfg__layers": 2},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_a_model_is_not_saved_with_a_config_of_another(tmp_path, fields):
    model, *_ = clipup.create_model_and_transforms(NAME)

    with pytest.raises(ValueError, match="model_cfg describes another model than the one that is given: .* describes"):
        save_pretrained(model, tmp_path / "out", changed(clipup.get_model_config(NAME), **fields))

    assert not (tmp_path / "out").exists()


def saved_checkpoint(path, model, config, moe_cfg=None, **more):
    content = {"state_dict": model.state_dict(), "epoch": 1, "model_cfg": config, "moe_cfg": moe_cfg, **more}
    torch.save({**content, "preprocess_cfg": None}, path)
    return str(path)


def test_a_checkpoint_of_another_image_size_loads_with_force_image_size_alone(tmp_path):
    model, *_ = clipup.create_model_and_transforms(NAME, force_image_size=64)
    config = changed(clipup.get_model_config(NAME), vision_cfg__image_size=64)
    path = saved_checkpoint(tmp_path / "epoch_1.pt", model, config)

    with pytest.raises(ValueError, match=r"vision_cfg.image_size=64, unlike .* \(32\); force"):
        clipup.create_model_and_transforms(NAME, path)
    same, _, transform = clipup.create_model_and_transforms(NAME, path, force_image_size=64)
    assert step0_difference(model, same) == 0 and "size=64" in str(transform)
    assert clipup.create_model_and_transforms(NAME, path, force_image_size=48)[0].visual.image_size == (48, 48)


def test_configs_of_one_function_do_not_differ():
    config = clipup.get_model_config(NAME)
    explicit = changed(clipup.get_model_config(NAME), quick_gelu=False, text_cfg__pool_type="argmax")
    explicit = changed(explicit, vision_cfg__image_size=[32, 32], vision_cfg__patch_dropout=0.5, init_logit_bias=-10)
    explicit = changed(explicit, custom_text=True, text_cfg__tokenizer_kwargs={}, text_cfg__hf_tokenizer_name="")
    assert differing(explicit, config) == {}
    assert differing(changed(explicit, text_cfg__heads=4), config) == {"text_cfg.heads": (4, 2)}


@pytest.mark.parametrize("trained", [{"top_k": 1}, {"normalize_gates": "none"}])
def test_weights_of_sparse_layers_that_route_otherwise_are_not_loaded_into_a_model(tmp_path, trained):
    dense, *_ = clipup.create_model_and_transforms(NAME)
    model = upcycle(dense, MoEConfig(num_experts=2))
    other = upcycle(dense, MoEConfig(num_experts=2, **trained))
    config = clipup.get_model_config(NAME)
    path = saved_checkpoint(tmp_path / "moe.pt", other, config, other.moe_config.to_dict())

    with pytest.raises(ValueError, match=f"moe.pt .*{next(iter(trained))}"):
        clipup.load_checkpoint(model, path)

    clipup.load_checkpoint(upcycle(dense, other.moe_config.replace(capacity_factor=2.0, z_weight=0.1)), path)
    saved_checkpoint(path, model, {**config, "quick_gelu": True}, model.moe_config.to_dict())
    with pytest.raises(ValueError, match="moe.pt was trained as another model"):
        clipup.load_checkpoint(model, path)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_architecture_is_not_loaded_by_name(tmp_path, fields):
    model, *_ = clipup.create_model_and_transforms(NAME)
    moe = MoEConfig(num_experts=2)
    sparse = "quick_gelu" in fields
    config = changed(clipup.get_model_config(NAME), **fields)
    path = saved_checkpoint(
        tmp_path / "epoch_1.pt", upcycle(model, moe) if sparse else model, config, moe.to_dict() if sparse else None
    )
    with pytest.raises(ValueError, match=next(iter(fields)).replace("__", ".")):
        clipup.create_model_and_transforms(NAME, path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_of_every_kind_are_saved_in_any_precision_and_with_patch_dropout(tmp_path, kind):
    config = tiny_config(kind)
    model = upcycle(tiny_clip(kind), MoEConfig(num_experts=2, reinit_ratio=0.5))
    config["vision_cfg"]["patch_dropout"] = 0.25
    save_pretrained(model.half().train(), tmp_path, config)
    assert clipup.create_model_and_transforms(str(tmp_path))[0] is not None


def test_a_model_that_was_created_with_other_arguments_needs_their_config(tmp_path):
    model, *_ = clipup.create_model_and_transforms(NAME, init_logit_bias=-10.0)
    with pytest.raises(ValueError, match="logit_bias"):
        save_pretrained(model, tmp_path, clipup.get_model_config(NAME))
