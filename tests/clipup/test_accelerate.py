"""accelerate: dense MLP blocks on the CPU kernels, the model otherwise as it was."""

import importlib

import pytest
import torch
from tiny_clip import CONFIGS, tiny_clip
from tiny_families import HUGGING_FACE, TIMM, build, hugging_face_cfg, timm_model
from torch import nn

import clipup
from clipup.models import random_inputs
from clipup.towers import tower_blocks


def features(model):
    images, texts = random_inputs(model, batch_size=3)
    return model.encode_image(images), model.encode_text(texts)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_equal_to_rounding(kind):
    model = tiny_clip(kind).eval()
    fast = clipup.accelerate(model)
    replaced = [name for name, module in fast.named_modules() if type(module).__name__ == "AcceleratedMLP"]
    assert replaced
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = features(model)
        for _ in range(3):
            torch.manual_seed(0)
            assert_close(features(fast), theirs, 1e-5)


def test_the_kernels_are_what_runs(monkeypatch):
    calls = []
    module = importlib.import_module("clipup.accelerate")  # the function hides it as an attribute
    monkeypatch.setattr(module, "dense_mlp", lambda x, *rest: calls.append(x.shape) or torch.zeros_like(x))
    with torch.no_grad():
        features(clipup.accelerate(tiny_clip().eval()))
    assert len(calls) == 8  # 4 blocks in each of two towers


def test_texts_are_computed_to_the_end_of_the_longest_one():
    model = tiny_clip().eval()
    fast = clipup.accelerate(model)
    seen = []
    fast.transformer.resblocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    texts = torch.tensor([[5, 7, 63, 0, 0, 0, 0, 0, 0, 0], [5, 7, 8, 9, 63, 0, 0, 0, 0, 0]])
    with torch.inference_mode():
        assert_close([fast.encode_text(texts)], [model.encode_text(texts)], 1e-5)
    assert seen == [5]


def test_state_dict_and_parameters_stay_as_they_are():
    model = tiny_clip()
    fast = clipup.accelerate(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]
    model.load_state_dict(fast.state_dict())


def test_training_runs_as_before():
    model = tiny_clip()
    fast = clipup.accelerate(model)
    for each in (model, fast):
        torch.manual_seed(0)
        sum(f.square().sum() for f in features(each)).backward()
    for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_a_model_that_is_cast_or_changed_later_is_followed():
    fast = clipup.accelerate(tiny_clip().eval())
    with torch.no_grad():
        before = [features(fast) for _ in range(2)][-1]
        for parameter in fast.parameters():
            parameter.mul_(1.01)
        plain = tiny_clip().eval()
        plain.load_state_dict(fast.state_dict())
        torch.manual_seed(0)
        ours = features(fast)
        torch.manual_seed(0)
        assert_close(ours, features(plain), 1e-5)
        assert not torch.equal(ours[0], before[0])
        image, _ = random_inputs(plain, batch_size=2)
        half = fast.to(torch.bfloat16).encode_image(image.bfloat16())
        assert (half.float() - plain.encode_image(image)).abs().max() < 0.05 * half.abs().max()


def test_sparse_models_keep_their_sparse_blocks():
    sparse = clipup.upcycle(tiny_clip(), clipup.MoEConfig()).eval()
    fast = clipup.accelerate(sparse)
    assert list(clipup.moe_layers(fast)) == list(clipup.moe_layers(sparse))
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = features(sparse)
        torch.manual_seed(0)
        assert_close(features(fast), theirs, 1e-5)


def test_the_model_itself_is_changed_only_when_asked():
    model = tiny_clip()
    assert clipup.accelerate(model) is not model
    assert not any(type(module).__name__ == "AcceleratedMLP" for module in model.modules())
    assert clipup.accelerate(model, inplace=True) is model
    assert any(type(module).__name__ == "AcceleratedMLP" for module in model.modules())


def test_a_model_without_dense_mlps_is_refused():
    with pytest.raises(ValueError, match="no dense MLP to accelerate; MLPs that are read"):
        clipup.accelerate(nn.Linear(3, 3))


@pytest.mark.parametrize("name", TIMM)
def test_every_family_that_dense_mlp_computes_is_accelerated(name):
    model = timm_model(name).eval()
    if name.endswith("normed"):
        with pytest.raises(ValueError, match="no dense MLP to accelerate"):
            clipup.accelerate(model)
        return
    fast = clipup.accelerate(model)
    replaced = [module for module in fast.modules() if type(module).__name__ == "AcceleratedMLP"]
    assert len(replaced) == len(tower_blocks(model, "image"))
    images, _ = random_inputs(model, 2)
    with torch.inference_mode():
        assert_close([fast(images), fast(images)], [model(images)] * 2, 1e-5)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_towers_are_accelerated_where_their_mlp_is_one_module(name, tmp_path):
    model = build(hugging_face_cfg(HUGGING_FACE[name](), tmp_path)).eval()
    fast = clipup.accelerate(model)
    replaced = [n for n, module in fast.named_modules() if type(module).__name__ == "AcceleratedMLP"]
    assert sum(n.startswith("text.") for n in replaced) == (2 if name.startswith("MT5") else 0)
    with torch.inference_mode():
        assert_close(features(fast), features(model), 1e-5)


def test_dropout_in_training_mode_is_the_models_own(tmp_path):
    model = build(hugging_face_cfg(HUGGING_FACE["MT5Block/MT5DenseActDense"](), tmp_path)).train()
    fast = clipup.accelerate(model)
    with torch.no_grad():
        found = []
        for each in (model, fast):
            torch.manual_seed(1)
            found.append(features(each)[1])
    assert torch.equal(*found)
