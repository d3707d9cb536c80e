"""Options that change the model and its transforms: --force-image-size, --aug-cfg and their like."""

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_config
from torchvision.transforms import Normalize, RandomResizedCrop

import clipup
from clipup.cli import main
from clipup.train import train
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

    def build(**changes):
        of_run = options(**changes)
        return build_model(of_run.model, of_run.transforms, None, torch.device("cpu"), "fp32")

    return build


def find(transform, kind):
    return next(step for step in transform.transforms if isinstance(step, kind))


@pytest.mark.parametrize("name, forced", [("tiny", {**FORCED, "siglip": True}), ("of-timm", {"force_image_size": 64})])
def test_a_run_with_another_architecture_and_loss_is_saved_as_what_it_is(
    monkeypatch, named_model, options, csv_data, tmp_path, name, forced
):
    of_timm = {**tiny_config("timm"), "text_cfg": open_clip.get_model_config(named_model)["text_cfg"]}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "of-timm", of_timm)
    settings = {"model": name, "train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 2, "moe": True}
    result = train(options(**settings, **forced))
    model, run = result.model.eval(), result.directory
    assert main(["convert", str(run / "checkpoints" / "epoch_latest.pt"), str(tmp_path / "out")]) == 0

    for directory in (run / "model", tmp_path / "out"):
        loaded, _, preprocess = clipup.create_model_and_transforms(str(directory))
        image = preprocess(Image.new("RGB", (30, 20), "red"))[None]
        texts = clipup.get_tokenizer(str(directory))(["colour number 3"])
        assert image.shape[-1] == forced["force_image_size"] and loaded.moe_config == model.moe_config
        assert torch.equal(loaded.encode_image(image), model.encode_image(image))
        assert torch.equal(loaded.encode_text(texts), model.encode_text(texts))
    if name == "tiny":
        assert isinstance(loaded, open_clip.CustomTextCLIP) and texts.shape == (1, 12)
        assert loaded.visual.patch_dropout.prob == 0.5 and "QuickGELU" in str(loaded)
        assert loaded.logit_bias.item() == model.logit_bias.item() == pytest.approx(-10, abs=0.01)
        assert loaded.logit_scale.exp().item() == pytest.approx(10, abs=0.1)
        again = {**settings, "model": str(run / "model"), "moe": False, "name": "again"}
        again = train(options(**again, siglip=True, force_patch_dropout=0.0)).model
        assert isinstance(again.visual.patch_dropout, torch.nn.Identity)


def test_transforms_take_mean_interpolation_resize_mode_and_augmentations(built, model_directory):
    made = built(
        model=str(model_directory),
        image_mean=(0.5,),
        image_std=(0.1, 0.2, 0.3),
        image_interpolation="bilinear",
        image_resize_mode="longest",
        aug_cfg={"scale": (0.3, 0.4)},
    )
    normalize = find(made.preprocess_val, Normalize)
    assert normalize.mean == (0.5,) * 3 and normalize.std == (0.1, 0.2, 0.3)
    assert find(made.preprocess_train, RandomResizedCrop).scale == (0.3, 0.4)
    assert made.preprocess_val.transforms[1].interpolation.value == "bilinear"
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
    with pytest.raises(ValueError, match="another architecture than 'ViT-B-32'"):
        built(model="ViT-B-32", pretrained=str(model_directory))
