"""Options that change the model and its transforms: --force-image-size, --aug-cfg and their like."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_config
from torchvision.transforms import Normalize, RandomResizedCrop

import clipup
from clipup.cli import main
from clipup.train import train
from clipup.train.ranks.distributed import Ranks
from clipup.train.setup import build_model

FORCED = {
    "force_image_size": 24,
    "force_context_length": 12,
    "force_patch_dropout": 0.5,
    "force_quick_gelu": True,
    "force_custom_text": True,
}


@pytest.fixture
def built(options):
    """What a run is built from, under these options."""
    return lambda **changes: build_model(options(**changes), Ranks(torch.device("cpu")), "fp32")


def find(transform, kind):
    return next(step for step in transform.transforms if isinstance(step, kind))


def test_a_run_with_another_architecture_and_loss_is_saved_as_what_it_is(named_model, options, csv_data):
    settings = {"model": named_model, "train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 2}
    result = train(options(**settings, **FORCED, moe=True, siglip=True))

    directory = str(result.directory / "model")
    config = json.loads((result.directory / "model" / "open_clip_config.json").read_text())["model_cfg"]
    loaded, _, preprocess = clipup.create_model_and_transforms(directory)
    texts = clipup.get_tokenizer(directory)(["colour number 3"])
    image = preprocess(Image.new("RGB", (30, 20), "red"))[None]
    assert isinstance(loaded, open_clip.CustomTextCLIP) and texts.shape == (1, 12) and image.shape == (1, 3, 24, 24)
    assert config["vision_cfg"]["patch_dropout"] == 0.5 and loaded.visual.patch_dropout.prob == 0.5
    assert "QuickGELU" in str(loaded) and loaded.moe_config == result.model.moe_config
    assert torch.equal(loaded.logit_bias, result.model.logit_bias)
    assert loaded.logit_bias.item() == pytest.approx(-10, abs=0.01)
    result.model.eval()
    assert torch.equal(loaded.encode_image(image), result.model.encode_image(image))
    assert torch.equal(loaded.encode_text(texts), result.model.encode_text(texts))


def test_an_image_tower_of_timm_is_trained_and_loaded_at_another_size(monkeypatch, options, csv_data, tmp_path):
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "of-timm", {**tiny_config("timm"), "text_cfg": text})
    settings = {"train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 1, "moe": True}
    result = train(options(model="of-timm", force_image_size=64, **settings))
    run = result.directory
    assert main(["convert", str(run / "checkpoints" / "epoch_latest.pt"), str(tmp_path / "out")]) == 0

    image = torch.randn(1, 3, 64, 64)
    result.model.eval()
    for directory in (run / "model", tmp_path / "out"):
        loaded = clipup.create_model_and_transforms(str(directory))[0]
        assert torch.equal(loaded.encode_image(image), result.model.encode_image(image))
    larger = clipup.create_model_and_transforms(str(directory), force_image_size=96)[0]
    assert larger.encode_image(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_transforms_take_mean_interpolation_resize_mode_and_augmentations(built, model_directory):
    made = built(
        model=str(model_directory),
        image_mean=(0.5,),
        image_std=(0.1, 0.2, 0.3),
        image_interpolation="bilinear",
        image_resize_mode="longest",
        aug_cfg={"scale": (0.3, 0.4)},
    )
    for transform in (made.preprocess_train, made.preprocess_val):
        assert find(transform, Normalize).mean == (0.5,) * 3 and find(transform, Normalize).std == (0.1, 0.2, 0.3)
    assert find(made.preprocess_train, RandomResizedCrop).scale == (0.3, 0.4)
    assert made.preprocess_val.transforms[0].interpolation.value == "bilinear"
    wide = made.preprocess_val(Image.new("RGB", (40, 20), "white"))
    assert wide[0, 0, 8] < wide[0, 8, 8]  # padded above, not cropped


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"force_image_size": 32}, "force_image_size: no effect"),
        ({"aug_cfg": {"re_prob": 0.1}}, "aug_cfg: no effect"),
        ({"model": "tiny"}, "model: it is another than 'tiny'"),
    ],
)
def test_what_does_not_fit_a_model_that_is_passed_in_is_refused(
    named_model, make_model, pairs, options, changes, message
):
    with pytest.raises(ValueError, match=message):
        train(options(**changes), model=make_model(quick_gelu=True), loader=pairs())


def test_pretrained_weights_of_another_architecture_are_refused(named_model, built, model_directory):
    assert built(model=named_model, pretrained=str(model_directory)).model_cfg is not None
    with pytest.raises(ValueError, match="model is 'ViT-B-32'"):
        built(model="ViT-B-32", pretrained=str(model_directory))
