"""timm models, dense and sparse, saved and loaded."""

import json

import huggingface_hub
import pytest
import timm
import torch

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, step0_difference, upcycle

CONFIG = MoEConfig.clip_up(num_experts=3, towers=("image",))
NAMES = ["test_vit", "test_convnext"]


def make(name, **options):
    torch.manual_seed(torch.seed() % 2**31)
    return timm.create_model(name, **options).eval()


def sparse_of(model):
    sparse = upcycle(model, CONFIG)
    with torch.no_grad():
        for layer in moe_layers(sparse).values():
            layer.in_weight.add_(0.1 * torch.randn_like(layer.in_weight))
    return sparse


def assert_equal(model, other, size=160):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_timm_model_loads_unchanged(tmp_path, name, prefix):
    sparse = sparse_of(make(name))

    save_pretrained(sparse, tmp_path)
    loaded = clipup.create_timm_model(f"{prefix}{tmp_path}")

    assert loaded.moe_config == CONFIG and moe_layers(loaded).keys() == moe_layers(sparse).keys()
    assert_equal(loaded, sparse)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    other = clipup.upcycle(make(name), CONFIG.replace(top_k=CONFIG.top_k + 1))
    with pytest.raises(ValueError, match=r"another moe_cfg than the model has \(top_k\)"):
        clipup.load_checkpoint(other, tmp_path / "model.safetensors")


def test_model_arguments_are_saved(tmp_path):
    sparse = sparse_of(make("test_vit", img_size=64, num_classes=5))

    save_pretrained(sparse, tmp_path, {"img_size": 64, "num_classes": 5})

    assert_equal(clipup.create_timm_model(str(tmp_path)), sparse, size=64)


def test_a_model_of_gray_images_with_hooks_of_its_own_is_saved(tmp_path):
    sparse, seen = sparse_of(make("test_vit", in_chans=1, num_classes=5)), []
    assert step0_difference(sparse, sparse) == 0
    sparse.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))

    save_pretrained(sparse, tmp_path, {"in_chans": 1, "num_classes": 5})

    assert not seen and "GFLOP per image" in (tmp_path / "README.md").read_text()


def test_dense_timm_model_loads_in_timm(tmp_path):
    dense = make("test_vit")
    save_pretrained(dense, tmp_path)

    assert_equal(clipup.create_timm_model(str(tmp_path)), dense)
    assert_equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), dense)


def test_sparse_timm_model_loads_from_the_hub(tmp_path, publish, monkeypatch):
    sparse = sparse_of(make("test_vit"))
    save_pretrained(sparse, tmp_path / "model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    assert_equal(clipup.create_timm_model("hf-hub:org/vit", **publish(tmp_path / "model", "vit")), sparse)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("model.safetensors", None, FileNotFoundError),
        ("config.json", None, FileNotFoundError),
        ("config.json", "[", ValueError),
        ("config.json", {"num_experts": 4}, ValueError),
    ],
)
def test_incomplete_timm_directories_are_refused(tmp_path, file, content, error):
    save_pretrained(sparse_of(make("test_vit")).train(), tmp_path)
    if isinstance(content, dict):
        config = json.loads((tmp_path / file).read_text())
        content = json.dumps(config | {"moe_cfg": config["moe_cfg"] | content})
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(error):
        clipup.create_timm_model(str(tmp_path))
    if file == "model.safetensors":
        model = clipup.create_timm_model(str(tmp_path), load_weights=False)
        assert moe_layers(model) and not any(module.training for module in model.modules())
