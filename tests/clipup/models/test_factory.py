import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, save_pretrained, upcycle
from clipup.clip.inputs import random_inputs
from clipup.data.images import load_image

CONFIG = MoEConfig(num_experts=3)


@pytest.mark.parametrize("name", ["ViT-B-61", "ViT-B/16"])
@pytest.mark.parametrize("call", [clipup.create_model_and_transforms, clipup.get_tokenizer, clipup.get_model_config])
def test_unknown_names_are_refused_with_similar_names(call, name):
    with pytest.raises(ValueError, match=f"'{name}' is neither an open_clip model nor a dir.* ViT-B-16"):
        call(name)


def test_the_directory_of_a_finished_run_stands_for_its_model(tmp_path):
    save_pretrained(tiny_clip(), tmp_path / "run" / "model", tiny_config())
    model, *_ = clipup.create_model_and_transforms(str(tmp_path / "run"))
    assert torch.equal(model.logit_scale, tiny_clip().logit_scale)
    assert clipup.get_model_config(str(tmp_path / "run")) == tiny_config()
    assert clipup.get_tokenizer(str(tmp_path / "run")) is not None


def test_required_weights_may_be_those_of_a_sparse_model(tmp_path):
    model = upcycle(tiny_clip(), CONFIG)
    save_pretrained(model, tmp_path, tiny_config())
    loaded, *_ = clipup.create_model_and_transforms(str(tmp_path), require_pretrained=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="Required pretrained weights"):
        clipup.create_model_and_transforms(str(tmp_path), require_pretrained=True, load_weights=False)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-32", "laion", "pretrained='laion' is neither a file nor a tag of ViT-B-32; .*openai"),
        (__file__, None, "pass it as pretrained"),
    ],
)
def test_unknown_weights_and_a_file_as_the_name_are_refused(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        clipup.create_model_and_transforms(name, pretrained)


@pytest.mark.parametrize(
    ("tower", "message"),
    [("", "text pos_embed width changed"), ("visual.", r"Missing key\(s\) in state_dict")],
)
def test_dense_weights_of_another_model_are_refused(tmp_path, tower, message):
    weights = tiny_clip("timm").state_dict()
    torch.save({name: value for name, value in weights.items() if name.startswith(tower)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"could not create ViT-B-32: .*{message}") as caught:
        clipup.create_model_and_transforms("ViT-B-32", str(tmp_path / "other.pt"))
    assert "\n" not in str(caught.value)


def test_config_cannot_run_code_of_a_tokenizer(tmp_path, monkeypatch):
    """transformers runs such code if a config sets `trust_remote_code` in `tokenizer_kwargs`."""
    config = tiny_config()
    config["text_cfg"] |= {"hf_tokenizer_name": "org/words", "tokenizer_kwargs": {"trust_remote_code": True}}
    save_pretrained(tiny_clip(), tmp_path, config)
    trace = tmp_path / "executed"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "own.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import BertTokenizer\nclass Own(BertTokenizer): pass\n"
    )
    content = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n")

    with pytest.raises(ValueError, match="tokenizer_kwargs .* trust_remote_code"):
        clipup.get_tokenizer(str(tmp_path))
    del config["text_cfg"]["tokenizer_kwargs"]
    save_pretrained(tiny_clip(), tmp_path / "asks", config, tokenizer_directory=tmp_path)
    (tmp_path / "asks" / "own.py").write_text((tmp_path / "own.py").read_text())
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to transformers, which would ask
    with pytest.raises(ValueError, match="needs code that comes with it, and clipup does not run that"):
        clipup.get_tokenizer(str(tmp_path / "asks"))

    assert not trace.exists()


@pytest.mark.parametrize("kind", ["gelu", "custom_text", "timm"])
def test_open_clips_features_keep_working_on_a_sparse_model(kind):
    sparse = upcycle(tiny_clip(kind), CONFIG).eval()
    images, texts = random_inputs(sparse, 2)
    expected = sparse(images, texts)
    sparse.set_grad_checkpointing(True)
    with torch.no_grad():
        torch.testing.assert_close(sparse(images, texts)[0], expected[0])
    out = sparse.forward_intermediates(images, texts)
    torch.testing.assert_close(out["image_features"], expected[0])
    torch.testing.assert_close(out["text_features"], expected[1])
    sparse.lock_image_tower()
    assert not any(parameter.requires_grad for parameter in sparse.visual.parameters() if parameter.dim() == 3)


@pytest.mark.parametrize("upcycled", [False, True])
def test_created_models_are_in_evaluation_mode(tmp_path, upcycled):
    model = upcycle(tiny_clip(), CONFIG) if upcycled else tiny_clip()
    save_pretrained(model.train(), tmp_path, tiny_config())
    for created in (
        clipup.create_model_and_transforms(str(tmp_path))[0],
        clipup.create_model_and_transforms(str(tmp_path), load_weights=False)[0],
    ):
        assert not any(module.training for module in created.modules())


def noise(mode):
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values.view(np.uint16)[..., 0])
    if mode == "RGBA":
        return Image.fromarray(values)
    return Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "L", "I;16", "CMYK"])
def test_the_transforms_read_an_opened_file_as_the_data_loaders_do(tmp_path, mode, training):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    noise(mode).save(path)
    _, *transforms = clipup.create_model_and_transforms("clipup-tiny-32", load_weights=False)
    preprocess = transforms[0] if training else transforms[1]
    with Image.open(path) as opened:
        assert opened.mode == mode
        found, loaded = [torch.manual_seed(0) and preprocess(image) for image in (opened, load_image(str(path)))]
    assert torch.equal(found, loaded)
