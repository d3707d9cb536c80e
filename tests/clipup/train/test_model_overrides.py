"""Options that change the model and the transforms that belong to it: --force-image-size, --aug-cfg and their like."""

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


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "sparse"])
def test_a_run_with_another_architecture_is_saved_as_what_it_is(named_model, options, csv_data, moe):
    settings = {"model": named_model, "train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 2, "moe": moe}
    result = train(options(**settings, **FORCED))

    config = json.loads((result.directory / "model" / "open_clip_config.json").read_text())["model_cfg"]
    loaded, _, preprocess = clipup.create_model_and_transforms(str(result.directory / "model"))
    texts = clipup.get_tokenizer(str(result.directory / "model"))(["colour number 3"])
    image = preprocess(Image.new("RGB", (30, 20), "red"))[None]
    assert isinstance(loaded, open_clip.CustomTextCLIP) and texts.shape == (1, 12) and image.shape == (1, 3, 24, 24)
    assert config["vision_cfg"]["patch_dropout"] == 0.5 and loaded.visual.patch_dropout.prob == 0.5
    assert "QuickGELU" in str(loaded)
    result.model.eval()
    assert torch.equal(loaded.encode_image(image), result.model.encode_image(image))
    assert torch.equal(loaded.encode_text(texts), result.model.encode_text(texts))


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "sparse"])
def test_an_image_tower_of_timm_is_trained_and_loaded_at_another_size(monkeypatch, options, csv_data, tmp_path, moe):
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "of-timm", {**tiny_config("timm"), "text_cfg": text})
    settings = {"train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 1, "moe": moe}
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


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_position_embeddings_of_saved_weights_are_resized(built, make_model, model_directory, tmp_path, sparse):
    config = clipup.get_model_config(str(model_directory))
    directory = tmp_path / "saved"
    clipup.save_pretrained(make_model(clipup.MoEConfig(num_experts=2) if sparse else None), directory, config)
    model = built(model=str(directory), force_image_size=(32, 16), force_context_length=6).model
    dense = make_model()

    assert model.visual.positional_embedding.shape == (1 + 4 * 2, 32) and model.positional_embedding.shape == (6, 32)
    assert torch.equal(model.visual.positional_embedding[0], dense.visual.positional_embedding[0])
    assert torch.equal(model.text_projection, dense.text_projection)


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


@pytest.mark.parametrize("changes", [{"force_image_size": 32}, {"image_mean": (0.5,)}, {"aug_cfg": {"re_prob": 0.1}}])
def test_they_are_refused_for_a_model_that_is_passed_in(make_model, pairs, options, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: no effect on a model that is passed in"):
        train(options(**changes), model=make_model(), loader=pairs())


def test_a_model_that_is_passed_in_is_that_of_the_name(named_model, make_model, pairs, options):
    with pytest.raises(ValueError, match="model: it is another than 'tiny'"):
        train(options(model=named_model), model=make_model(quick_gelu=True), loader=pairs())
