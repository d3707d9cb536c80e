"""Loading a sparse model: no random initialization, and no dependence on the file afterwards."""

import pytest
import torch
from tiny_clip import tiny_clip, tiny_config
from tiny_families import HUGGING_FACE, build, hugging_face_cfg

import clipup
from clipup import MoEConfig, save_pretrained, step0_difference, upcycle
from clipup.models.model_directory import WEIGHTS_NAME


@pytest.fixture
def directory(tmp_path):
    save_pretrained(upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=3)), tmp_path / "model", tiny_config())
    return tmp_path / "model"


def test_loading_draws_no_random_numbers_and_the_model_does_not_depend_on_its_file(directory):
    before = torch.get_rng_state()
    model, *_ = clipup.create_model_and_transforms(str(directory))
    assert torch.equal(torch.get_rng_state(), before)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    path = directory / WEIGHTS_NAME
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_shared_parameters_of_a_text_tower_stay_shared(tmp_path, name):
    cfg = hugging_face_cfg(HUGGING_FACE[name](), tmp_path / "text")
    model = upcycle(build(cfg), MoEConfig.clip_up(num_experts=3, towers=("text",), blocks="every"))
    save_pretrained(model, tmp_path / "model", cfg)
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path / "model"))
    assert shared_names(loaded) == shared_names(model)
    assert step0_difference(model, loaded) == 0


def shared_names(model):
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
