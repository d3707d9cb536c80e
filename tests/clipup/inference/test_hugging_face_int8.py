"""transformers' own save_pretrained and from_pretrained save and load models in int8."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_hugging_face import CONFIGS, tiny_hugging_face

import clipup
import clipup_kernels
from clipup.clip.hugging_face import random_batch

pytestmark = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ quantizes weights")
MATRIX = "text_model.encoder.layers.0.mlp.in_weight"
CONFIG = clipup.MoEConfig(num_experts=3, shared_expert=True)


@torch.inference_mode()
def outputs(model):
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in random_batch(model, 2).items()}
    return [value for value in model(**batch).values() if torch.is_tensor(value)]


def assert_same(loaded, model):
    ours, theirs = outputs(loaded), outputs(model)
    assert ours and all(map(torch.equal, ours, theirs)) and type(loaded) is type(model)
    assert clipup.accelerate_report(loaded) == clipup.accelerate_report(model)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_computes_the_same_bit_for_bit(name, sparse, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plain = tiny_hugging_face(name)
    model = clipup.accelerate(clipup.upcycle(plain, CONFIG) if sparse else plain, weights="int8")
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert_same(loaded, model)
    assert not any(report.values())


def test_transformers_refuses_the_files_if_clipup_is_not_imported(tmp_path, monkeypatch):
    clipup.accelerate(tiny_hugging_face("CLIPModel"), weights="int8").save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING, "clipup_int8")
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "clipup_int8")
    for part in (transformers.CLIPModel, transformers.CLIPVisionModel, transformers.CLIPTextModel):
        with pytest.raises(RuntimeError, match="mismatched"):
            part.from_pretrained(tmp_path)


def test_a_layer_that_was_left_for_its_hook_is_loaded_plain(tmp_path):
    plain = tiny_hugging_face("CLIPModel")
    plain.get_submodule(MATRIX.removesuffix(".in_weight")).register_forward_hook(lambda layer, args, output: None)
    model = clipup.accelerate(plain, weights="int8")
    model.save_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(transformers.AutoModel.from_pretrained(tmp_path)), outputs(model)))


def test_calibrated_excluded_and_bfloat16_layers_are_saved_again_and_again(tmp_path):
    plain = tiny_hugging_face("CLIPModel").bfloat16()
    batch = {**random_batch(plain, 100), "pixel_values": torch.randn(100, 3, 16, 16, dtype=torch.bfloat16)}
    model = clipup.accelerate(plain, weights="int8", calibrate=[batch], exclude=["*1.self_attn.*"])
    for directory in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(directory)
        loaded = transformers.AutoModel.from_pretrained(directory)
        assert_same(loaded, model)
        model = loaded
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    assert one[MATRIX].dtype == torch.int8 and f"{MATRIX}_scale" in one


def change_tensors(directory, change):
    tensors = {name: value.clone() for name, value in load_file(directory / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_version(directory):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_version, "quantization_config .* install a newer one"),
        (lambda to: change_tensors(to, lambda tensors: tensors.pop(MATRIX)), f"{MATRIX} is missing"),
        (lambda to: change_tensors(to, lambda tensors: tensors.update({MATRIX: tensors[MATRIX][1:]})), "mismatch"),
        (lambda to: change_tensors(to, lambda tensors: tensors.update({MATRIX: tensors[MATRIX].int()})), "torch.int32"),
        (lambda to: os.truncate(to / "model.safetensors", 9_000), "incomplete|deserializ"),
    ],
)
def test_damaged_and_foreign_files_are_refused(damage, message, tmp_path):
    clipup.accelerate(tiny_hugging_face("CLIPModel"), weights="int8").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(Exception, match=message):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_other_devices_are_refused(tmp_path):
    model = clipup.accelerate(tiny_hugging_face("CLIPModel"), weights="int8")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map has cuda"):
        transformers.AutoModel.from_pretrained(tmp_path, device_map="cuda")
    assert_same(transformers.AutoModel.from_pretrained(tmp_path, device_map="cpu"), model)


def layers(model):
    return [(row.layer, row.error) for row in clipup.accelerate_report(model) if row.weights == "int8"]


PARTS = {
    "CLIPVisionModelWithProjection": ("CLIPModel", "vision"),
    "CLIPVisionModel": ("CLIPModel", "vision"),
    "CLIPTextModel": ("CLIPModel", "text"),
    "SiglipVisionModel": ("SiglipModel", "vision"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_tower_of_a_saved_model_is_loaded_in_int8(part, tmp_path):
    whole, tower = PARTS[part]
    model = clipup.accelerate(tiny_hugging_face(whole), weights="int8", exclude=[f"{tower}_model.encoder.layers.1.*"])
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, part).from_pretrained(tmp_path)
    batch = random_batch(loaded, 2)
    with torch.inference_mode():
        expected = model.get_submodule(f"{tower}_model")(**batch)
        assert loaded(**batch).last_hidden_state.equal(expected.last_hidden_state)
    assert layers(loaded) == layers(model.get_submodule(f"{tower}_model"))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_the_base_of_a_saved_model_and_a_head_on_a_saved_base_are_loaded_in_int8(name, tmp_path):
    config = CONFIGS[name]()
    config.qkv_bias = False  # of a ViT: calibration adds biases
    plain = getattr(transformers, name)(config).eval()
    rows = [random_batch(plain, 100) for _ in range(2)]
    whole = clipup.accelerate(plain, weights="int8", calibrate=rows, exclude=["*layer*.1.*"])
    whole.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    own = getattr(whole, whole.base_model_prefix)
    assert layers(base) == layers(own) and all(error is not None for _, error in layers(own)[1:])
    batch = random_batch(base, 2)
    with torch.inference_mode():
        assert base(**batch).last_hidden_state.equal(own(**batch).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    headed, report = type(whole).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not [key for key in report["unexpected_keys"] if "layer" in key]
    with torch.inference_mode():
        again = headed.get_submodule(whole.base_model_prefix)(**batch).last_hidden_state
        assert again.equal(base(**batch).last_hidden_state)


def test_a_tower_of_a_model_that_was_cast_after_loading_has_its_type(tmp_path):
    tiny_hugging_face("CLIPModel").save_pretrained(tmp_path / "plain")
    plain = transformers.CLIPModel.from_pretrained(tmp_path / "plain").bfloat16()
    clipup.accelerate(plain, weights="int8").save_pretrained(tmp_path / "int8")
    assert transformers.CLIPVisionModel.from_pretrained(tmp_path / "int8").dtype == torch.bfloat16


def test_a_tower_and_a_model_in_a_wrapper_are_saved_alone(tmp_path):
    wrapper = clipup.accelerate(torch.nn.Sequential(tiny_hugging_face("CLIPModel")), weights="int8")
    wrapper[0].save_pretrained(tmp_path / "whole")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert_same(loaded, wrapper[0])
    for model in (wrapper[0].vision_model, loaded.vision_model):
        model.save_pretrained(tmp_path)
        assert_same(type(model).from_pretrained(tmp_path), model)
