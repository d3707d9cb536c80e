import json
import resource
import signal

import open_clip
import pytest
import safetensors.torch
import torch
from tiny_clip import CONFIGS, tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.atomic_files import replace_files
from clipup.cli import main
from clipup.cli.logs import errors_only
from clipup.clip.inputs import random_inputs
from clipup.models import tokenizers
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


def edit_config(directory, change):
    path = directory / CONFIG_NAME
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


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


def test_directory_has_open_clips_files_a_card_and_the_configs(saved):
    assert set(contents(saved)) == {"open_clip_config.json", "open_clip_model.safetensors", "README.md"}
    config = json.loads((saved / CONFIG_NAME).read_text())
    assert config["model_cfg"] == tiny_config() and MoEConfig.from_dict(config["moe_cfg"]) == CONFIG


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


def test_open_clip_refuses_a_sparse_model(saved):
    with pytest.raises(RuntimeError, match="Missing key.*resblocks.1.mlp.c_fc.weight"):
        open_clip.create_model_and_transforms(f"local-dir:{saved}")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("pure_fp16", torch.float16)])
def test_experts_load_in_the_precision_of_the_model(saved, precision, dtype):
    loaded, *_ = clipup.create_model_and_transforms(str(saved), precision=precision)
    assert {p.dtype for layer in moe_layers(loaded).values() for p in layer.parameters()} == {dtype}
    images, texts = random_inputs(loaded, 2)
    assert loaded(images, texts)[0].isfinite().all()


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


def test_another_image_size_resizes_position_embeddings(saved):
    loaded, *_ = clipup.create_model_and_transforms(str(saved), force_image_size=32)
    assert loaded.visual.positional_embedding.shape[0] == 17
    assert loaded.encode_image(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_model_can_be_created_without_weights(saved):
    (saved / WEIGHTS_NAME).unlink()
    loaded, *_ = clipup.create_model_and_transforms(str(saved), load_weights=False)
    assert len(moe_layers(loaded)) == 4


def test_loading_logs_no_warning(saved, caplog):
    clipup.create_model_and_transforms(str(saved))
    assert caplog.text == ""


def more_experts(config):
    config["moe_cfg"]["num_experts"] = 5


def fewer_sparse_blocks(config):
    config["moe_cfg"]["blocks"] = [1]


def wider_tower(config):
    config["model_cfg"]["vision_cfg"]["width"] = 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            more_experts,
            r"visual.transformer.resblocks.1.mlp.in_weight is \[3, 128, 32\] in the file, \[5, 128, 32\] in the model; "
            r".* more",
        ),
        (
            fewer_sparse_blocks,
            r"visual.*resblocks.3.mlp.c_fc.weight is missing from the file",
        ),
        (wider_tower, r"visual.class_embedding is \[32\] in the file, \[64\] in the model"),
    ],
)
def test_weights_of_different_shapes_are_refused(saved, change, message):
    edit_config(saved, change)
    with pytest.raises(ValueError, match=message):
        clipup.create_model_and_transforms(str(saved))


def test_invalid_directories_are_refused(saved, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no open_clip_config.json in .*empty"):
        clipup.create_model_and_transforms(str(empty))
    with pytest.raises(FileNotFoundError, match="no open_clip_config.json in .*nowhere"):
        clipup.create_model_and_transforms(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="pretrained='openai' cannot be used with the directory"):
        clipup.create_model_and_transforms(str(saved), "openai")
    with pytest.raises(ValueError, match="jit=True is not supported for sparse models"):
        clipup.create_model_and_transforms(str(saved), jit=True)
    (saved / WEIGHTS_NAME).write_bytes((saved / WEIGHTS_NAME).read_bytes()[:-100])
    with pytest.raises(ValueError, match="open_clip_model.safetensors is not a complete safetensors file"):
        clipup.create_model_and_transforms(str(saved))
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="no open_clip_model.safetensors in .*; load_weights=False creates"):
        clipup.create_model_and_transforms(str(saved))
    (saved / CONFIG_NAME).write_text('{"model_cfg": ')
    with pytest.raises(ValueError, match="open_clip_config.json is not valid JSON"):
        clipup.create_model_and_transforms(str(saved))
    (saved / CONFIG_NAME).write_text("{}")
    with pytest.raises(ValueError, match="open_clip_config.json: model_cfg lacks"):
        clipup.create_model_and_transforms(str(saved))


def test_models_that_could_not_be_loaded_again_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model_cfg lacks vision_cfg, text_cfg"):
        save_pretrained(make_sparse(), tmp_path / "out", {"embed_dim": 16})
    sparse = make_sparse()
    del sparse.moe_config
    with pytest.raises(ValueError, match="sparse layers but no moe_config"):
        save_pretrained(sparse, tmp_path / "out", tiny_config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_failed_write_leaves_the_previous_model_unchanged(saved, monkeypatch, failing):
    before = contents(saved)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if failing == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    else:
        monkeypatch.setattr("pathlib.Path.write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        save_pretrained(make_sparse(config=CONFIG.replace(num_experts=2)), saved, tiny_config())
    assert contents(saved) == before


def test_file_size_limit_leaves_the_previous_model_unchanged(saved):
    before = contents(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError):
            save_pretrained(make_sparse(), saved, tiny_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(saved) == before


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    def fail(path):
        path.write_text("half")
        raise ValueError("stop")

    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(ValueError, match="stop"):
        replace_files({first: lambda path: path.write_text("new"), second: fail})
    assert contents(tmp_path) == {"first": b"old"}
    replace_files({first: lambda path: path.write_text("new"), second: lambda path: path.write_text("new")})
    assert contents(tmp_path) == {"first": b"new", "second": b"new"}


def test_a_directory_in_the_place_of_a_file_leaves_the_previous_model_unchanged(saved):
    (saved / "README.md").unlink()
    (saved / "README.md").mkdir()
    before = (saved / WEIGHTS_NAME).read_bytes(), (saved / CONFIG_NAME).read_bytes()

    with pytest.raises(IsADirectoryError, match="README.md is a directory, and should be a file; nothing was changed"):
        save_pretrained(tiny_clip(), saved, tiny_config())

    assert ((saved / WEIGHTS_NAME).read_bytes(), (saved / CONFIG_NAME).read_bytes()) == before


def test_tied_parameters_are_saved(tmp_path):
    model = tiny_clip()
    model.visual.proj = model.text_projection

    save_pretrained(model, tmp_path, tiny_config())

    assert step0_difference(model, clipup.create_model_and_transforms(str(tmp_path))[0]) == 0


WORDS = {"hf_tokenizer_name": "words:icons", "vocab_size": 7}


@pytest.fixture
def with_words(tmp_path):
    """A directory whose model has three words of its own, the model, and its config."""
    config = tiny_config()
    config["text_cfg"] |= WORDS
    model, directory = tiny_clip(text_cfg=WORDS), tmp_path / "own"
    directory.mkdir()
    (directory / "vocabulary.txt").write_text("red\ngreen\nblue\n")
    save_pretrained(model, directory, config, tokenizer_directory=f"local-dir:{directory}")
    return directory, model, config


def test_a_vocabulary_of_another_size_than_the_models_is_not_saved(with_words, tmp_path):
    _, model, config = with_words
    with pytest.raises(ValueError, match="vocabulary words:icons has 6139 tokens, but the model has vocab_size=7"):
        save_pretrained(model, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_directory_that_is_not_there_is_refused(with_words, tmp_path):
    _, model, config = with_words
    with pytest.raises(FileNotFoundError, match="tokenizer_directory: there is no directory .*owm"):
        save_pretrained(model, tmp_path / "out", config, tokenizer_directory=tmp_path / "owm")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_in_a_directory_is_kept(with_words, tmp_path):
    directory, model, config = with_words
    named = {**config, "text_cfg": {**config["text_cfg"], "hf_tokenizer_name": "org/words"}}
    save_pretrained(model, tmp_path / "plain", named)
    for name in ("tokenizer_config.json", "vocab.txt"):
        (directory / name).write_text("{}")

    save_pretrained(model, directory, config, tokenizer_directory=directory)
    assert clipup.get_tokenizer(str(directory))(["blue"])[0, 1] == 5
    for source in (None, tmp_path / "plain"):
        with pytest.raises(ValueError, match=r"holds a tokenizer \(tokenizer_config.json\) that is not the model's"):
            save_pretrained(model, directory, named, tokenizer_directory=source)


def test_files_of_tokenizers_that_the_config_does_not_use_are_left_as_they_are(tmp_path):
    files = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "vocabulary.txt")
    for name in files:
        (tmp_path / name).write_text(name)

    save_pretrained(tiny_clip(), tmp_path, tiny_config())
    save_pretrained(tiny_clip(), tmp_path, tiny_config(), tokenizer_directory=tmp_path)

    assert all((tmp_path / name).read_text() == name for name in files)


def test_the_vocabulary_of_a_directory_is_saved_with_what_is_made_of_it(tmp_path):
    config = tiny_config()
    config["text_cfg"] |= WORDS
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "vocabulary.txt").write_text("red\ngreen\nblue\n")
    model = tiny_clip(text_cfg=WORDS)
    save_pretrained(model, tmp_path / "first", config, tokenizer_directory=tmp_path / "first")

    assert main(["upcycle", str(tmp_path / "first"), str(tmp_path / "second")]) == 0

    tokens = [clipup.get_tokenizer(str(tmp_path / name))(["blue"]).tolist() for name in ("first", "second")]
    assert tokens[0] == tokens[1] and tokens[0][0][1] == 5


def test_the_hugging_face_tokenizer_of_a_directory_is_saved_with_what_is_made_of_it(tmp_path):
    config = tiny_config()
    config["text_cfg"] |= {"hf_tokenizer_name": "org/words"}
    save_pretrained(tiny_clip(), tmp_path / "first", config)
    for name in ("tokenizer_config.json", "vocab.txt"):
        (tmp_path / "first" / name).write_bytes(name.encode())

    save_pretrained(tiny_clip(), tmp_path / "second", config, tokenizer_directory=tmp_path / "first")

    assert set(contents(tmp_path / "second")) == set(contents(tmp_path / "first"))
    assert (tmp_path / "second" / "vocab.txt").read_bytes() == b"vocab.txt"


def test_the_kind_of_a_tokenizer_of_hugging_face_is_saved_with_it(tmp_path):
    pytest.importorskip("transformers")
    config = tiny_config()
    config["text_cfg"] |= {"hf_tokenizer_name": "org/words"}
    first = tmp_path / "first"
    save_pretrained(tiny_clip(), first, config)
    (first / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n##d\nre\n")
    (first / "tokenizer_config.json").write_text("{}")
    (first / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    expected = clipup.get_tokenizer(str(first))(["Redd"])

    save_pretrained(tiny_clip(), tmp_path / "second", config, tokenizer_directory=first)
    save_pretrained(tiny_clip(), first, config, tokenizer_directory=first)

    files = tokenizers.files_of(config["text_cfg"], first)
    assert torch.equal(clipup.get_tokenizer(str(tmp_path / "second"))(["Redd"]), expected)
    assert torch.equal(tokenizers.from_files(config, files)(["Redd"]), expected)
    assert (first / "config.json").read_text() == '{"model_type": "bert", "hidden_size": 8}'


def test_all_files_have_default_permissions(saved):
    plain = saved / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {plain.stat().st_mode}


@pytest.mark.parametrize(("kind", "error"), [("dense", ValueError), ("sparse", FileNotFoundError)])
def test_a_directory_without_weights_is_refused(tmp_path, kind, error):
    save_pretrained(tiny_clip() if kind == "dense" else make_sparse(), tmp_path, tiny_config())
    (tmp_path / WEIGHTS_NAME).unlink()

    with pytest.raises(error, match=str(tmp_path)):
        clipup.create_model_and_transforms(str(tmp_path))

    assert clipup.create_model_and_transforms(str(tmp_path), load_weights=False)[0] is not None
