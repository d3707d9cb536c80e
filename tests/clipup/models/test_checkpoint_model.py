"""A training checkpoint is the model that was trained: with its activation, its transform of images and its bias."""

import open_clip
import pytest
import torch

import clipup
from clipup import MoEConfig, step0_difference, upcycle
from clipup.cli import main
from clipup.cli.runs import model_of
from clipup.clip.inputs import random_inputs

PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
NAME = "clipup-tiny-32"


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint of a run of NAME with other options, and gives its path and model."""

    def write(sparse=False, **options):
        created = {"force_quick_gelu": options.get("quick_gelu", False)}
        if options.get("init_logit_bias") is not None:
            created["init_logit_bias"] = options["init_logit_bias"]
        model, *_ = clipup.create_model_and_transforms(NAME, load_weights=False, **created)
        if sparse:
            model = upcycle(model, MoEConfig(num_experts=2))
        path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
        path.parent.mkdir(parents=True)
        configs = {"model_cfg": clipup.get_model_config(NAME) | options, "preprocess_cfg": PREPROCESS}
        configs["tokenizer_files"] = {}
        configs["moe_cfg"] = model.moe_config.to_dict() if sparse else None
        torch.save({"state_dict": model.state_dict(), "optimizer": {}, "epoch": 1, "step": 1, **configs}, path)
        return path, model.eval()

    return write


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_checkpoint_brings_the_image_transform_of_its_training(checkpoint, sparse):
    path, model = checkpoint(sparse)

    loaded, _, transform = clipup.create_model_and_transforms(NAME, str(path))
    assert "0.5, 0.4, 0.3" in str(transform) and step0_difference(model, loaded) == 0
    assert "0.1, 0.2, 0.3" in str(clipup.create_model_and_transforms(NAME, str(path), image_mean=[0.1, 0.2, 0.3])[2])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_checkpoint_with_another_activation_than_the_named_model_is_refused(checkpoint, sparse, tmp_path):
    path, model = checkpoint(sparse, quick_gelu=True)

    with pytest.raises(
        ValueError, match="epoch_1.pt' was trained with quick_gelu=True, unlike .* give the directory of the run"
    ):
        clipup.create_model_and_transforms(NAME, str(path))
    loaded, *_ = clipup.create_model_and_transforms(NAME, str(path), force_quick_gelu=True)
    assert step0_difference(model, loaded) == 0
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    assert step0_difference(model, clipup.create_model_and_transforms(str(tmp_path / "out"))[0]) == 0


def test_models_made_of_a_checkpoint_with_a_logit_bias_load(checkpoint, tmp_path):
    path, model = checkpoint(init_logit_bias=-7.5)
    bare = tmp_path / "open_clip.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, bare)

    assert main(["upcycle", NAME, str(tmp_path / "sparse"), "--pretrained", str(path)]) == 0
    assert main(["convert", str(bare), str(tmp_path / "converted"), "--model", NAME]) == 0

    for directory in ("sparse", "converted"):
        loaded, *_ = clipup.create_model_and_transforms(str(tmp_path / directory))
        assert torch.equal(loaded.logit_bias, model.logit_bias) and step0_difference(model, loaded) < 1e-6


def test_a_checkpoint_with_a_text_tower_of_hugging_face_is_converted_without_its_pretrained_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertConfig(vocab_size=32, **sizes).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_pooler_type": "mean_pooler", "context_length": 8}
    config = clipup.get_model_config(NAME) | {"text_cfg": text}
    model = open_clip.CustomTextCLIP(**{**config, "text_cfg": {**text, "hf_model_pretrained": False}}).eval()
    path = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 1, "model_cfg": config}, path)

    assert main(["convert", str(path), str(tmp_path / "out")]) == 0

    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path / "out"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_the_model_of_an_unfinished_run_is_inspected_as_it_was_trained(checkpoint):
    path, model = checkpoint(True, quick_gelu=True, init_logit_bias=-7.5)
    with model_of(str(path.parent.parent)) as name:
        loaded, _, transform = clipup.create_model_and_transforms(name)

    images, texts = random_inputs(model, 2)
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert "0.5, 0.4, 0.3" in str(transform)
