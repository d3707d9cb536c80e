"""Wrong arguments are refused before any work, with a message naming the argument, its value and what is expected."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_clip import tiny_clip, tiny_config
from torch import nn

import clipup
from clipup import MoEConfig, SparseMoE, aux_loss, calibrate, moe_layers, moe_metrics, step0_difference, upcycle
from clipup.clip.inputs import random_inputs

D = 12


def make_layer(**options):
    return SparseMoE(**{"d_model": D, "d_hidden": 16, "num_experts": 4, **options})


@pytest.mark.parametrize("config", [{}, None, "clip_up", {"num_experts": 4}, MoEConfig], ids=repr)
def test_config_must_be_a_moe_config(config):
    layer, message = make_layer(), f"config must be a clipup.MoEConfig, got {type(config).__name__}"
    before = layer.config
    with pytest.raises(TypeError, match=message):
        layer.config = config
    with pytest.raises(TypeError, match=message):
        layer.router.config = config
    assert layer.config is before
    if config is not None:  # None means the default
        with pytest.raises(TypeError, match=message):
            upcycle(tiny_clip(), config)


@pytest.mark.parametrize("model", [None, "ViT-B-32", {}, [nn.Identity()], (nn.Identity(), None, None)], ids=type)
def test_model_must_be_a_module(model):
    sparse = upcycle(tiny_clip(), MoEConfig(num_experts=4))
    message = f"model must be a torch.nn.Module, got {type(model).__name__}"
    several = isinstance(model, list | tuple)  # upcycle takes several models
    for function in (*(() if several else (upcycle,)), aux_loss, moe_layers, moe_metrics, clipup.update_selection_bias):
        with pytest.raises(TypeError, match=message):
            function(model)
    with pytest.raises(TypeError, match=message):
        calibrate(model, tiny_clip(), [])
    with pytest.raises(TypeError, match=message):
        clipup.save_pretrained(model, "nowhere")
    with pytest.raises(TypeError, match=message):
        clipup.load_checkpoint(model, "nowhere")
    with pytest.raises(TypeError, match="dense must be a torch.nn.Module"):
        step0_difference(model, sparse)
    with pytest.raises(TypeError, match="sparse must be a torch.nn.Module"):
        step0_difference(tiny_clip(), model)


def test_errors_say_how_to_fix_the_argument():
    with pytest.raises(TypeError, match=r"create it first: model, _, .* = clipup.create_model_and_tr\w+\('ViT-B-32'\)"):
        upcycle("ViT-B-32")
    with pytest.raises(TypeError, match=r"first: model = transformers.AutoModel.from_pretrained\('openai/clip-\S+'\)"):
        upcycle("openai/clip-vit-base-patch16")
    with pytest.raises(TypeError, match="pass one model at a time"):
        aux_loss([make_layer()])
    with pytest.raises(TypeError, match="inplace must be True or False, got 'no'"):
        upcycle(tiny_clip(), inplace="no")


@pytest.mark.parametrize("name", [None, Path("runs"), 1], ids=type)
def test_model_name_must_be_a_str(name):
    for function in (clipup.create_model_and_transforms, clipup.get_tokenizer, clipup.get_model_config):
        with pytest.raises(TypeError, match=f"model_name must be a str.* got {type(name).__name__}"):
            function(name)
    with pytest.raises(TypeError, match="name must be a str"):
        clipup.create_timm_model(name)


def test_inputs_and_learning_rate_are_checked():
    dense = tiny_clip()
    sparse = upcycle(dense, MoEConfig(num_experts=4))
    with pytest.raises(TypeError, match="images must be a tensor, got list"):
        step0_difference(dense, sparse, images=[1])
    for lr, error, expected in [
        (math.nan, ValueError, "must be finite, got nan"),
        (math.inf, ValueError, "must be finite, got inf"),
        (0, ValueError, "must be positive, got 0"),
        ("x", TypeError, "must be a number, got 'x'"),
    ]:
        with pytest.raises(error, match=f"lr {expected}"):
            calibrate(sparse, dense, [random_inputs(dense, 2)], lr=lr)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_weights_of_non_floating_dtypes_are_refused(tmp_path, dtype, sparse):
    model = tiny_clip()
    if sparse:
        model = upcycle(model, MoEConfig(num_experts=4), inplace=True)
    clipup.save_pretrained(model, tmp_path, model_cfg=tiny_config(), preprocess_cfg={})
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    name = "visual.ln_post.weight"
    weights[name] = weights[name].to(dtype)
    path = tmp_path / "open_clip_model.safetensors"
    safetensors.torch.save_file(weights, path)
    message = f"{name} is {dtype} in the file, torch.float32 in the model"
    with pytest.raises(ValueError, match=message):
        clipup.create_model_and_transforms(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        clipup.load_checkpoint(model, path)
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        clipup.load_checkpoint(model, tmp_path / "weights.pt")


def test_dense_weights_of_non_floating_dtypes_are_refused(tmp_path):
    model = clipup.create_model_and_transforms("clipup-tiny-32")[0]
    weights = {**model.state_dict(), "visual.proj": torch.zeros_like(model.visual.proj, dtype=torch.int64)}
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="visual.proj is torch.int64 in the file, torch.float32 in the model"):
        clipup.create_model_and_transforms("clipup-tiny-32", str(tmp_path / "weights.safetensors"))


def test_weights_of_other_floating_dtypes_are_converted(tmp_path):
    model = tiny_clip()
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(halves, tmp_path / "weights.safetensors")
    clipup.load_checkpoint(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.visual.proj, halves["visual.proj"].float())


def test_non_tensor_values_count_as_missing_weights(tmp_path):
    model = tiny_clip()
    torch.save({**model.state_dict(), "visual.proj": 3}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="visual.proj is missing from the file"):
        clipup.load_checkpoint(model, tmp_path / "weights.pt")
