"""The dense model that the demonstration starts from: how it is made out of a trained one, and the one that ships."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

import clipup
from clipup.demo.options import START
from clipup.demo.ship import ship
from clipup.models import factory, model_names, tokenizers
from clipup.models.model_directory import WEIGHTS_NAME
from clipup.models.saving import save_pretrained

NAME = "clipup-icons-w64"


@pytest.fixture
def trained(tmp_path):
    with factory.expecting_random_weights():
        model, *_ = factory.create_model_and_transforms(NAME, load_weights=False)
    save_pretrained(model, tmp_path / "trained", model_names.get_model_config(NAME))
    return model, tmp_path / "trained"


def test_a_shipped_model_is_the_trained_one_in_half_the_bytes(trained, tmp_path):
    model, directory = trained

    ship(directory, tmp_path / "shipped")

    tensors = safetensors.torch.load_file(tmp_path / "shipped" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path / "shipped"))
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float()), name


def test_the_model_that_ships_is_small_and_dense_and_loads():
    assert (START / WEIGHTS_NAME).stat().st_size < 4e6
    model, *_ = clipup.create_model_and_transforms(str(START))
    assert not clipup.moe_layers(model) and all(p.isfinite().all() for p in model.parameters())
    assert tokenizers.get_tokenizer(str(START))("arrow left").shape == (1, 12)
