"""Weights are loaded into the plain model: a prepared one refuses them, and stays as it is."""

import copy
import pickle

import pytest
import torch
from tiny_clip import tiny_clip

import clipup
from clipup_kernels.backends import extension

int8 = pytest.param("int8", marks=pytest.mark.skipif(extension.NATIVE is None, reason="only C++ quantizes weights"))
with_weights = pytest.mark.parametrize("weights", [None, int8])


def upcycled(seed=0):
    return clipup.upcycle(tiny_clip("gelu", seed), clipup.MoEConfig()).eval()


def tensors(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@with_weights
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("path", ["", "visual", "transformer.resblocks.0", "transformer.resblocks.0.mlp"])
def test_a_prepared_model_refuses_weights_before_it_loads_any(path, strict, weights):
    other, prepared = upcycled(seed=1), clipup.accelerate(upcycled(), weights=weights)
    with torch.no_grad():
        other.logit_scale.add_(1)
    state = other.get_submodule(path).state_dict()
    for fast in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        before = tensors(fast)
        with pytest.raises(RuntimeError, match=r"load_state_dict .* clipup\.accelerate"):
            fast.get_submodule(path).load_state_dict(state, strict)
        torch.testing.assert_close(tensors(fast), before, rtol=0, atol=0, equal_nan=True)


@with_weights
def test_a_checkpoint_is_not_loaded_into_a_prepared_model(weights, tmp_path):
    torch.save(upcycled(seed=1).state_dict(), tmp_path / "weights.pt")
    fast = clipup.accelerate(upcycled(), weights=weights)
    before = tensors(fast)
    with pytest.raises(ValueError, match=r"model was prepared by clipup\.accelerate"):
        clipup.load_checkpoint(fast, tmp_path / "weights.pt")
    torch.testing.assert_close(tensors(fast), before, rtol=0, atol=0, equal_nan=True)
