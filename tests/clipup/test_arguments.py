"""Wrong arguments are refused before any work, with a message naming the argument, its value and what is expected."""

import math

import pytest
import safetensors.torch
import torch
from tiny_clip import tiny_clip, tiny_config
from torch import nn

import clipup
from clipup import MoEConfig, SparseMoE, aux_loss, calibrate, moe_layers, moe_metrics, step0_difference, upcycle

RATES = ((math.nan, ValueError), (0, ValueError), ("x", TypeError))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda dense: upcycle(dense, {"num_experts": 4}), TypeError, "config must be a clipup.MoEConfig"),
        (lambda dense: setattr(SparseMoE(8, 16), "config", {}), TypeError, "config must be a clipup.MoEConfig"),
        *((lambda dense, lr=lr: calibrate(dense, dense, [], lr=lr), error, "lr must be") for lr, error in RATES),
    ],
)
def test_wrong_argument_is_named_in_the_error(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_clip())


@pytest.mark.parametrize("model", ["ViT-B-32", (nn.Identity(), None, None)], ids=type)
def test_model_must_be_a_module(model):
    functions = {aux_loss: (), moe_layers: (), moe_metrics: (), clipup.update_selection_bias: ()}
    functions |= {calibrate: (tiny_clip(), []), clipup.save_pretrained: ("nowhere",), clipup.load_checkpoint: ("no",)}
    functions |= {step0_difference: (model,)} | ({upcycle: ()} if isinstance(model, str) else {})
    for function, others in functions.items():
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            function(model, *others)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_of_non_floating_dtypes_are_refused(tmp_path, dtype):
    model = upcycle(tiny_clip(), MoEConfig(num_experts=4), inplace=True)
    clipup.save_pretrained(model, tmp_path, model_cfg=tiny_config(), preprocess_cfg={})
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights["visual.ln_post.weight"] = weights["visual.ln_post.weight"].to(dtype)
    paths = tmp_path / "open_clip_model.safetensors", tmp_path / "weights.pt"
    safetensors.torch.save_file(weights, paths[0])
    torch.save({"state_dict": weights}, paths[1])
    calls = [lambda path=path: clipup.load_checkpoint(model, path) for path in paths]
    for call in (lambda: clipup.create_model_and_transforms(str(tmp_path)), *calls):
        with pytest.raises(ValueError, match=f"visual.ln_post.weight is {dtype} in the file"):
            call()


def test_weights_of_other_floating_dtypes_are_converted(tmp_path):
    model = tiny_clip()
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(halves, tmp_path / "weights.safetensors")
    clipup.load_checkpoint(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.visual.proj, halves["visual.proj"].float())
