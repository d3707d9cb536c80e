"""Models on the Hugging Face hub, from a local cache without a network."""

import huggingface_hub
import pytest
import torch
from PIL import Image
from tiny_clip import save_with_words, tiny_clip, tiny_config

import clipup
import clipup_kernels
from clipup import MoEConfig, save_pretrained, step0_difference, upcycle
from clipup.cli import main

CONFIG = MoEConfig.clip_up(num_experts=3, towers=("image", "text"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def sparse():
    return upcycle(tiny_clip(seed=torch.seed() % 2**31), CONFIG)


def test_a_sparse_model_of_the_hub_loads_without_a_network(sparse, tmp_path, publish):
    save_pretrained(sparse, tmp_path / "model", tiny_config())
    cache = publish(tmp_path / "model", "sparse")

    loaded, *_ = clipup.create_model_and_transforms("hf-hub:org/sparse", **cache)

    assert loaded.moe_config == CONFIG and step0_difference(sparse, loaded) == 0
    assert clipup.get_tokenizer("hf-hub:org/sparse", **cache)(["a dog"]).shape == (1, 10)


@pytest.fixture
def own_words(tmp_path, publish, monkeypatch):
    """The directory of a model with a vocabulary of its own, which is on the hub too."""
    save_with_words(tmp_path / "own")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", publish(tmp_path / "own", "own")["cache_dir"])
    return tmp_path / "own"


def tokens(name):
    return clipup.get_tokenizer(str(name))(["blue red"]).tolist()


def test_models_made_of_a_model_of_the_hub_keep_its_tokenizer(own_words, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    (tmp_path / "data.csv").write_text("filepath\ttitle\n" + f"{tmp_path / 'image.png'}\tred\n" * 4)
    train = ["train", "--model", "hf-hub:org/own", "--train-data", str(tmp_path / "data.csv"), "--steps", "1"]

    assert main(["upcycle", "hf-hub:org/own", str(tmp_path / "sparse")]) == 0
    assert main([*train, *"--batch-size 4 --workers 0 --device cpu --name run --logs".split(), str(tmp_path)]) == 0

    assert tokens(own_words) == tokens(tmp_path / "sparse") == tokens(tmp_path / "run" / "model")


def write_tokenizer(directory, words):
    """A Hugging Face tokenizer of whole words."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(directory)


def test_a_tokenizer_of_hugging_face_is_the_same_on_the_hub_as_in_the_directory(tmp_path, publish, monkeypatch):
    config = tiny_config()
    config["text_cfg"] |= {"hf_tokenizer_name": "org/base"}
    save_pretrained(tiny_clip(), tmp_path / "model", config)
    write_tokenizer(tmp_path / "model", ["blue", "green", "red"])
    write_tokenizer(tmp_path / "base", ["red", "green", "blue"])
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert"}')
    publish(tmp_path / "base", "base")
    cache = publish(tmp_path / "model", "model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache["cache_dir"])

    assert tokens("hf-hub:org/model") == tokens(tmp_path / "model")
    assert main(["upcycle", "hf-hub:org/model", str(tmp_path / "sparse")]) == 0
    assert tokens(tmp_path / "sparse") == tokens(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "pretrained", "what"),
    [
        (
            "ViT-B-32",
            "openai",
            "ViT-B-32 with the weights 'openai' (open_clip_model.safetensors of "
            "https://huggingface.co/timm/vit_base_patch32_clip_224.openai)",
        ),
        ("hf-hub:org/sparse", None, "hf-hub:org/sparse"),
    ],
)
def test_without_a_network_uncached_weights_are_named_with_what_to_do(tmp_path, caplog, name, pretrained, what):
    with pytest.raises(FileNotFoundError, match="cannot be downloaded") as caught:
        clipup.create_model_and_transforms(name, pretrained, cache_dir=str(tmp_path))
    assert str(caught.value).startswith(what) and f" is not in the cache {tmp_path} " in str(caught.value)
    assert "pass the file (pretrained) or the directory" in str(caught.value) and not caplog.records


@pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ quantizes weights")
def test_an_int8_model_loads_from_the_cache(tmp_path, publish):
    model = clipup.accelerate(tiny_clip().eval(), weights="int8")
    clipup.save_pretrained(model, tmp_path / "model", tiny_config())
    loaded, *_ = clipup.create_model_and_transforms("hf-hub:org/int8", **publish(tmp_path / "model", "int8"))
    assert clipup.accelerate_report(loaded) == clipup.accelerate_report(model)
