"""A training checkpoint is the model that was trained: with its activation, its transform of images and its bias."""

import pytest
import torch
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, step0_difference, upcycle
from clipup.cli import main
from clipup.cli.inspect import load
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
        configs["moe_cfg"] = model.moe_config.to_dict() if sparse else None
        torch.save({"state_dict": model.state_dict(), "optimizer": {}, "epoch": 1, "step": 1, **configs}, path)
        return path, model.eval()

    return write


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_its_images_are_transformed_as_in_training(checkpoint, sparse):
    path, model = checkpoint(sparse)

    loaded, _, transform = clipup.create_model_and_transforms(NAME, str(path))
    assert "0.5, 0.4, 0.3" in str(transform) and step0_difference(model, loaded) == 0
    assert "0.1, 0.2, 0.3" in str(clipup.create_model_and_transforms(NAME, str(path), image_mean=[0.1, 0.2, 0.3])[2])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_another_activation_than_that_of_the_name_is_refused(checkpoint, sparse, tmp_path):
    path, model = checkpoint(sparse, quick_gelu=True)

    with pytest.raises(
        ValueError, match="epoch_1.pt' was trained with quick_gelu=True, unlike .*; use force_quick_gelu"
    ):
        clipup.create_model_and_transforms(NAME, str(path))
    loaded, *_ = clipup.create_model_and_transforms(NAME, str(path), force_quick_gelu=True)
    assert step0_difference(model, loaded) == 0
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    assert step0_difference(model, clipup.create_model_and_transforms(str(tmp_path / "out"))[0]) == 0


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_its_logit_bias_is_loaded(checkpoint, sparse):
    path, model = checkpoint(sparse, init_logit_bias=-7.5)

    loaded, *_ = clipup.create_model_and_transforms(NAME, str(path))

    assert torch.equal(loaded.logit_bias, model.logit_bias) and step0_difference(model, loaded) == 0


def test_the_model_of_an_unfinished_run_is_inspected_as_it_was_trained(checkpoint):
    path, model = checkpoint(True, quick_gelu=True, init_logit_bias=-7.5)
    run = path.parent.parent
    (run / "options.json").write_text('{"model": "clipup-tiny-32"}')

    loaded, transform, _ = load(str(run), "cpu")

    images, texts = random_inputs(model, 2)
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert "0.5, 0.4, 0.3" in str(transform)


def test_another_model_than_the_checkpoints_own_is_refused(checkpoint, tmp_path, capsys):
    path, _ = checkpoint(quick_gelu=True)

    assert main(["convert", str(path), str(tmp_path / "out"), "--model", NAME]) == 2
    assert f"holds the config of its model, which is not that of '{NAME}'; drop --model" in capsys.readouterr().err


def test_the_vocabulary_that_a_run_began_with_is_converted_with_its_checkpoint(tmp_path):
    words = {"hf_tokenizer_name": "words:own", "vocab_size": 7}
    config = tiny_config()
    config["text_cfg"] |= words
    model = tiny_clip(text_cfg=words)
    first = tmp_path / "first"
    first.mkdir()
    (first / "vocabulary.txt").write_text("red\ngreen\nblue\n")
    clipup.save_pretrained(model, first, config, tokenizer_directory=first)
    path = tmp_path / "run" / "checkpoints" / "epoch_1.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict(), "epoch": 1, "model_cfg": config}, path)
    (tmp_path / "run" / "options.json").write_text(f'{{"model": null, "pretrained": "{first}"}}')

    assert main(["convert", str(path), str(tmp_path / "out")]) == 0

    assert clipup.get_tokenizer(str(tmp_path / "out"))(["blue"])[0, 1] == 5
