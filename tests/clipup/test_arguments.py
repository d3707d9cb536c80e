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
NUMBERS = ("norm_eps", "dropout", "router_noise", "selection_bias_rate", "balance_weight", "entropy_threshold")


def make_layer(**options):
    return SparseMoE(**{"d_model": D, "d_hidden": 16, "num_experts": 4, **options})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("bias", None, TypeError),
        ("gated", 1, TypeError),
        ("shared_expert", "yes", TypeError),
        ("dtype", torch.int64, TypeError),
        ("norm_eps", 0, ValueError),
        ("dropout", 1.0, ValueError),
        ("dropout", True, TypeError),
        ("entropy_threshold", -5, ValueError),
        ("d_model", None, ValueError),
        ("capacity_factor", math.inf, ValueError),
        *[(name, value, error) for name in NUMBERS for value, error in (("x", TypeError), (math.nan, ValueError))],
    ],
)
def test_invalid_layer_option_is_named_in_the_error(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        make_layer(**{name: value})


def test_images_must_be_a_tensor():
    dense = tiny_clip()
    with pytest.raises(TypeError, match="images must be a tensor"):
        step0_difference(dense, upcycle(dense, MoEConfig(num_experts=4)), images=[1])


def test_config_must_be_a_moe_config():
    layer, config = make_layer(), {"num_experts": 4}
    before = layer.config
    for call in (
        lambda: setattr(layer, "config", config),
        lambda: upcycle(tiny_clip(), config),
    ):
        with pytest.raises(TypeError, match="config must be a clipup.MoEConfig"):
            call()
    assert layer.config is before


@pytest.mark.parametrize("model", ["ViT-B-32", (nn.Identity(), None, None)], ids=type)
def test_model_must_be_a_module(model):
    one = [aux_loss, moe_layers, moe_metrics, clipup.update_selection_bias]
    calls = [lambda function=function: function(model) for function in one]
    calls += [
        lambda: calibrate(model, tiny_clip(), []),
        lambda: clipup.save_pretrained(model, "nowhere"),
        lambda: clipup.load_checkpoint(model, "nowhere"),
        lambda: step0_difference(model, model),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            call()
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        upcycle("ViT-B-32")


def test_model_name_must_be_a_str():
    for function in (
        *(clipup.create_model_and_transforms, clipup.get_tokenizer, clipup.get_model_config),
        clipup.create_timm_model,
    ):
        with pytest.raises(TypeError, match="name must be a str"):
            function(Path("runs"))


@pytest.mark.parametrize("lr", [math.nan, 0, "x"])
def test_learning_rate_is_checked(lr):
    dense = tiny_clip()
    sparse = upcycle(dense, MoEConfig(num_experts=4))
    with pytest.raises((TypeError, ValueError), match="lr must be"):
        calibrate(sparse, dense, [random_inputs(dense, 2)], lr=lr)


@pytest.mark.parametrize(("dtype", "sparse"), [(torch.int64, False), (torch.complex64, True)])
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
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    for call in (
        lambda: clipup.create_model_and_transforms(str(tmp_path)),
        lambda: clipup.load_checkpoint(model, path),
        lambda: clipup.load_checkpoint(model, tmp_path / "weights.pt"),
    ):
        with pytest.raises(ValueError, match=f"{name} is {dtype} in the file"):
            call()


def test_weights_of_other_floating_dtypes_are_converted(tmp_path):
    model = tiny_clip()
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(halves, tmp_path / "weights.safetensors")
    clipup.load_checkpoint(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.visual.proj, halves["visual.proj"].float())
