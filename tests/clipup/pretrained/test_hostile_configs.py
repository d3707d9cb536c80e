"""Configs of model directories that were not written by ``save_pretrained``: damaged, mistyped or hostile."""

import json
import re

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, save_pretrained, upcycle


@pytest.fixture
def directory(request, tmp_path):
    model = tiny_clip()
    if getattr(request, "param", "sparse") == "sparse":
        model = upcycle(model, MoEConfig(num_experts=2))
    save_pretrained(model, tmp_path / "model", tiny_config())
    return tmp_path / "model"


def change(directory, *keys, value):
    path = directory / "open_clip_config.json"
    config = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hf_tokenizer_name", "OUTSIDE"),
        ("hf_tokenizer_name", "../outside"),
        ("hf_tokenizer_name", "~/outside"),
        ("hf_tokenizer_name", ["org/name"]),
        ("tokenizer_kwargs", {"bpe_path": "OUTSIDE/vocabulary.gz"}),
        ("tokenizer_kwargs", {"vocab_file": "OUTSIDE/vocab.txt"}),
        ("tokenizer_kwargs", {"subfolder": "../outside"}),
        ("tokenizer_kwargs", {"vocab": "OUTSIDE/vocab.txt"}),
        ("tokenizer_kwargs", "clean"),
    ],
)
def test_the_tokenizer_in_a_config_cannot_be_files_outside(directory, tmp_path, field, value):
    outside = json.loads(json.dumps(value).replace("OUTSIDE", str(tmp_path / "outside")))
    change(directory, "model_cfg", "text_cfg", field, value=outside)
    with pytest.raises(ValueError, match=field) as caught:
        clipup.get_tokenizer(str(directory))
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("text_cfg", "unknown"), 1),
        (("unknown",), 1),
        (("text_cfg", "width"), "x"),
        (("embed_dim",), "16"),
        (("vision_cfg", "image_size"), "a"),
        (("text_cfg", "heads"), 0),
        (("text_cfg", "context_length"), None),
        (("text_cfg", "norm_kwargs"), {"unknown": 1}),
    ],
)
def test_a_field_that_open_clip_does_not_take_is_an_error_about_the_directory(directory, keys, value):
    change(directory, "model_cfg", *keys, value=value)
    with pytest.raises(ValueError, match=f"open_clip could not create local-dir:{re.escape(str(directory))}: "):
        clipup.create_model_and_transforms(str(directory), load_weights=False)


def own_tokenizer(directory, **config):
    """A word-piece tokenizer of Hugging Face in a model's directory."""
    pytest.importorskip("transformers")
    change(directory, "model_cfg", "text_cfg", "hf_tokenizer_name", value="org/words")
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab", "OUTSIDE/secret.txt"),
        ("merges", "OUTSIDE/secret.txt"),
        ("vocab_file", "OUTSIDE/secret.txt"),
        ("tokenizer_file", "../secret.txt"),
        ("vocab", "secret.txt"),
        ("fast_tokenizer_files", ["tokenizer.json", "../secret.txt"]),
    ],
)
def test_the_config_of_a_tokenizer_cannot_name_files_outside(directory, tmp_path, monkeypatch, key, value):
    (tmp_path / "secret.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsecret\n")
    monkeypatch.chdir(tmp_path)
    own_tokenizer(directory, **{key: json.loads(json.dumps(value).replace("OUTSIDE", str(tmp_path)))})

    with pytest.raises(
        ValueError, match=rf"tokenizer_config.json: {key} is .*secret.txt', a file outside of the model's"
    ):
        clipup.get_tokenizer(str(directory))


def test_the_config_of_a_tokenizer_may_name_its_own_files_and_what_is_nowhere(directory):
    own_tokenizer(directory, vocab_file="vocab.txt", special_tokens_map_file="/home/another/special_tokens_map.json")
    assert clipup.get_tokenizer(str(directory))(["red"])[0, 1] == 5


def test_a_tokenizer_in_the_cache_of_the_hub_and_of_this_machine_is_read(directory, tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "red"}')
    own_tokenizer(directory, vocab_file="vocab.txt", special_tokens_map_file=str(tmp_path / "special_tokens_map.json"))
    (tmp_path / "blobs").mkdir()
    (directory / "vocab.txt").rename(tmp_path / "blobs" / "0123")
    (directory / "vocab.txt").symlink_to("../blobs/0123")

    assert clipup.get_tokenizer(str(directory))(["red blue"])[0, :3].tolist() == [2, 5, 1]


def test_a_link_to_a_directory_does_not_bring_files_outside(directory, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "vocab.txt").write_text("secret\n")
    own_tokenizer(directory, vocab_file="link/vocab.txt")
    (directory / "link").symlink_to(tmp_path / "outside")

    with pytest.raises(ValueError, match="vocab_file is 'link/vocab.txt', a file outside of the model's"):
        clipup.get_tokenizer(str(directory))


@pytest.mark.parametrize("content", ["[]", "{", '"vocab.txt"'])
def test_a_config_of_a_tokenizer_that_is_no_object_is_refused(directory, content):
    own_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config.json (must be an object|is not valid JSON)"):
        clipup.get_tokenizer(str(directory))


@pytest.mark.parametrize("hub_name", ["org/words", None])
def test_no_options_of_a_tokenizer_are_none(directory, monkeypatch, hub_name):
    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", lambda name, **options: (name, options["context_length"]))
    change(directory, "model_cfg", "text_cfg", "hf_tokenizer_name", value=hub_name)
    change(directory, "model_cfg", "text_cfg", "tokenizer_kwargs", value=None)
    tokenizer = clipup.get_tokenizer(str(directory))
    assert tokenizer == ("org/words", 10) if hub_name else tokenizer(["red"]).shape == (1, 10)


@pytest.mark.parametrize("name", ["local-dir:/outside", "hf-hub:../outside", "../outside", ["vit"], 5])
def test_the_image_tower_in_a_config_cannot_be_files_outside(directory, name):
    change(directory, "model_cfg", "vision_cfg", "timm_model_name", value=name)
    with pytest.raises(ValueError, match="timm_model_name must be a name"):
        clipup.create_model_and_transforms(str(directory))


@pytest.mark.parametrize("field", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize("value", ["ViT-B-32", [], 7, None])
def test_a_tower_that_is_not_an_object_is_refused(directory, field, value):
    change(directory, "model_cfg", field, value=value)
    for call in clipup.create_model_and_transforms, clipup.get_tokenizer:
        with pytest.raises(ValueError, match=rf"{field} in .*open_clip_config.json must be an object, got"):
            call(str(directory))


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        ("vision_cfg", "image_size", -1),
        ("vision_cfg", "image_size", 0),
        ("vision_cfg", "patch_size", 0),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "layers", []),
        ("text_cfg", "context_length", 0),
    ],
)
@pytest.mark.parametrize("directory", ["dense", "sparse"], indirect=True)
def test_options_that_give_no_model_are_an_error_about_the_directory(directory, tower, field, value):
    change(directory, "model_cfg", tower, field, value=value)
    with pytest.raises(ValueError, match=f"could not create .*{re.escape(str(directory))}: ") as caught:
        clipup.create_model_and_transforms(str(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize("layers", [10**9, [10**9 - 3, 1, 1, 1]])
@pytest.mark.parametrize("directory", ["dense", "sparse"], indirect=True)
def test_more_layers_than_the_weights_can_have_are_refused_before_they_are_built(directory, tower, layers):
    change(directory, "model_cfg", tower, "layers", value=layers)
    with pytest.raises(ValueError, match=rf"{tower} has 1000000000 layers, but there are \d+ tensors of weights"):
        clipup.create_model_and_transforms(str(directory))


@pytest.mark.parametrize("field", ["mean", "std"])
@pytest.mark.parametrize("value", [[0.5, 0.5], ["a", "b", "c"], [], {}, True, [0.5, 0.5, float("nan")], float("inf")])
def test_normalization_of_images_is_checked(directory, field, value):
    change(directory, "preprocess_cfg", value={field: value})
    with pytest.raises((TypeError, ValueError), match=rf"open_clip_config.json.*{field}"):
        clipup.create_model_and_transforms(str(directory))


@pytest.mark.parametrize("value", [0, [1.0, 0.0, 1.0], -1])
def test_images_are_not_divided_by_zero(directory, value):
    change(directory, "preprocess_cfg", value={"std": value})
    with pytest.raises(ValueError, match=r"open_clip_config.json.*std.*positive"):
        clipup.create_model_and_transforms(str(directory))


@pytest.mark.parametrize("value", [0.5, 1, [0.4, 0.5, 0.6], None])
def test_normalization_by_numbers_and_lists_is_read(directory, value):
    change(directory, "preprocess_cfg", value={"std": value, "mean": value})
    *_, preprocess = clipup.create_model_and_transforms(str(directory))
    assert torch.isfinite(preprocess(Image.new("RGB", (20, 20)))).all()


def test_an_error_without_a_text_names_what_was_asserted(directory):
    change(directory, "preprocess_cfg", value={"interpolation": "none at all"})
    with pytest.raises(ValueError, match="could not create .*interpolation in"):
        clipup.create_model_and_transforms(str(directory))


def test_options_of_a_tokenizer_that_it_refuses_are_an_error_about_the_model(directory):
    change(directory, "model_cfg", "text_cfg", "tokenizer_kwargs", value={"clean": "none at all"})
    with pytest.raises(ValueError, match=rf"{re.escape(str(directory))}.*Invalid clean function"):
        clipup.get_tokenizer(str(directory))
