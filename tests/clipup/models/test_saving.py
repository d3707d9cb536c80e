import json

import open_clip
import pytest
import torch
from tiny_clip import CONFIGS, save_with_words, tiny_clip, tiny_config
from tiny_hugging_face import tiny_hugging_face

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.cli.logs import errors_only
from clipup.models.model_directory import CONFIG_NAME, WEIGHTS_NAME

CONFIG = MoEConfig.clip_up(num_experts=3, towers=("image", "text"))


def make_sparse(kind="gelu", config=CONFIG):
    model = upcycle(tiny_clip(kind), config)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.in_weight.add_(0.1 * torch.randn_like(layer.in_weight))
    return model


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    save_pretrained(make_sparse(), directory, tiny_config())
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_saved_model_loads_unchanged(tmp_path, kind, prefix):
    model = make_sparse(kind)
    save_pretrained(model, tmp_path, tiny_config(kind))
    loaded, *_ = clipup.create_model_and_transforms(f"{prefix}{tmp_path}")
    assert loaded.moe_config == CONFIG
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert step0_difference(model, loaded) == 0


@pytest.mark.parametrize("wrap", [torch.compile, torch.optim.swa_utils.AveragedModel, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path, wrap):
    model = make_sparse()
    save_pretrained(wrap(model), tmp_path, tiny_config())
    assert step0_difference(model, clipup.create_model_and_transforms(str(tmp_path))[0]) == 0


def test_preprocessing_is_saved_and_loaded(tmp_path):
    preprocess = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "resize_mode": "longest",
    }
    preprocess["fill_color"] = 7
    save_pretrained(make_sparse(), tmp_path / "one", tiny_config(), {**preprocess, "size": 99})
    loaded, _, transform = clipup.create_model_and_transforms(str(tmp_path / "one"))
    assert "0.1, 0.2, 0.3" in str(transform)
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in preprocess.items()}.items() <= (
        loaded.visual.preprocess_cfg.items()
    )
    save_pretrained(loaded, tmp_path / "two", tiny_config())
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_dense_model_is_saved_without_moe_cfg_and_loads_in_open_clip(tmp_path):
    dense = tiny_clip()
    save_pretrained(dense, tmp_path, tiny_config())
    for create in (clipup.create_model_and_transforms, open_clip.create_model_and_transforms):
        loaded, *_ = create(f"local-dir:{tmp_path}")
        assert not moe_layers(loaded) and step0_difference(dense, loaded) == 0


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_config_of_other_sizes_than_the_weights_says_what_it_resizes(kind, tmp_path, caplog):
    save_pretrained(tiny_clip() if kind == "dense" else make_sparse(), tmp_path, tiny_config())
    clipup.create_model_and_transforms(str(tmp_path))
    assert not caplog.messages
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 32
    config["model_cfg"]["text_cfg"]["context_length"] = 20
    path.write_text(json.dumps(config))
    with errors_only():
        clipup.create_model_and_transforms(str(tmp_path))
    (line,) = caplog.messages
    assert str(tmp_path) in line and "[5, 32] to [17, 32]" in line and "[10, 32] to [20, 32]" in line


def test_a_full_disk_leaves_the_previous_model_unchanged(saved, monkeypatch):
    def write_half(tensors, path, **metadata):
        path.write_bytes(bytes(50_000))
        raise OSError(28, "No space left on device")

    before = contents(saved)
    monkeypatch.setattr("safetensors.torch.save_file", write_half)
    with pytest.raises(OSError, match="open_clip_model.safetensors could not be written"):
        save_pretrained(make_sparse(), saved, tiny_config())
    assert contents(saved) == before


def test_a_vocabulary_of_another_size_than_the_models_is_not_saved(tmp_path):
    model, config = save_with_words(tmp_path / "own")
    with pytest.raises(ValueError, match="vocabulary words:icons has 6139 tokens, but the model has vocab_size=7"):
        save_pretrained(model, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_in_a_directory_is_kept(tmp_path):
    directory = tmp_path / "own"
    model, config = save_with_words(directory)
    named = {**config, "text_cfg": {**config["text_cfg"], "hf_tokenizer_name": "org/words"}}
    save_pretrained(model, tmp_path / "plain", named)
    for name in ("tokenizer_config.json", "vocab.txt"):
        (directory / name).write_text("{}")

    save_pretrained(model, directory, config, tokenizer_directory=directory)
    assert clipup.get_tokenizer(str(directory))(["blue"])[0, 1] == 5
    for source in (None, tmp_path / "plain"):
        with pytest.raises(ValueError, match=r"holds a tokenizer \(tokenizer_config.json\) that is not the model's"):
            save_pretrained(model, directory, named, tokenizer_directory=source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_cfg": {"num_experts": 5}}, r"mlp.in_weight is \[3, 128, 32\] in the file, \[5, 128, 32\] in the model"),
        ({"moe_cfg": {"blocks": [1]}}, "is missing from the file"),
        ({"model_cfg": None}, "model_cfg lacks"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(saved, change, message):
    config = json.loads((saved / CONFIG_NAME).read_text())
    for name, fields in change.items():
        config[name] = None if fields is None else {**config[name], **fields}
    (saved / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        clipup.create_model_and_transforms(str(saved))


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        (WEIGHTS_NAME, b"cut off", ValueError),
        (WEIGHTS_NAME, None, FileNotFoundError),
        (CONFIG_NAME, b'{"model_cfg": ', ValueError),
        (CONFIG_NAME, None, FileNotFoundError),
    ],
)
def test_incomplete_directories_are_refused_by_the_name_of_the_file(saved, file, content, error):
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_bytes(content)
    with pytest.raises(error, match=file):
        clipup.create_model_and_transforms(f"local-dir:{saved}")
    if file == WEIGHTS_NAME:
        assert len(moe_layers(clipup.create_model_and_transforms(str(saved), load_weights=False)[0])) == 4
        with pytest.raises(ValueError, match="pretrained="):
            clipup.create_model_and_transforms(str(saved), "openai")


def test_changed_configs_of_layers_are_saved(tmp_path):
    sparse = make_sparse()
    changes = {"top_k": 1, "normalize_gates": "none", "capacity_factor": 1.5, "z_weight": 0.25, "router_noise": 0.5}
    for layer in moe_layers(sparse).values():
        layer.config = layer.config.replace(**changes)
    save_pretrained(sparse, tmp_path, tiny_config())

    loaded = clipup.create_model_and_transforms(str(tmp_path))[0]
    assert loaded.moe_config == CONFIG.replace(**changes) and step0_difference(sparse, loaded) == 0
    assert "top 1" in (tmp_path / "README.md").read_text()


def test_an_option_edited_in_the_config_of_a_saved_model_takes_effect(saved):
    config = json.loads((saved / CONFIG_NAME).read_text())
    config["moe_cfg"]["capacity_factor"] = 2.0
    (saved / CONFIG_NAME).write_text(json.dumps(config))
    layers = moe_layers(clipup.create_model_and_transforms(str(saved))[0])
    assert {layer.config.capacity_factor for layer in layers.values()} == {2.0}


def test_models_that_could_not_be_loaded_again_are_not_saved(tmp_path):
    sparse = make_sparse()
    for config in ({"embed_dim": 16}, tiny_config()):
        with pytest.raises(ValueError, match="model_cfg|moe_config"):
            save_pretrained(sparse, tmp_path / "out", config)
        del sparse.moe_config
        sparse.moe_config = None
    changed = make_sparse()
    next(iter(moe_layers(changed).values())).config = CONFIG.replace(top_k=1, normalize_gates="none")
    with pytest.raises(ValueError, match=r"config differs from visual.*config \(top_k, normalize_gates\)"):
        save_pretrained(changed, tmp_path / "out", tiny_config())
    with pytest.raises(TypeError, match="BertModel of transformers: use its own save_pretrained"):
        save_pretrained(tiny_hugging_face("BertModel"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="tokenizer_directory"):
        save_pretrained(tiny_clip(), tmp_path / "out", tiny_config(), tokenizer_directory=tmp_path / "owm")
    assert not (tmp_path / "out").exists()
