"""Files of weights: dense and sparse training checkpoints, with and without wrappers, and files that contain code."""

import pickle

import pytest
import safetensors.torch
import torch
from strangers import MakesFile
from tiny_clip import tiny_clip, tiny_config
from torch import nn
from torch.optim.swa_utils import AveragedModel

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, step0_difference, upcycle
from clipup.models.model_directory import WEIGHTS_NAME
from clipup.models.state_dicts import read_weights

NAME = "clipup-tiny-32"
CONFIG = MoEConfig.clip_up(num_experts=3, blocks=(1, 2), towers=("image", "text"))


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(torch.seed() % 2**31)
    return clipup.create_model_and_transforms(NAME)[0]


@pytest.fixture(scope="module")
def sparse(dense):
    model = upcycle(dense, CONFIG)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.in_weight.add_(0.1 * torch.randn_like(layer.in_weight))
    return model


def training_checkpoint(model, path, wrapped, **more):
    """A checkpoint as open_clip's trainer writes it: with the optimizer, and prefixed names under DDP."""
    optimizer = torch.optim.AdamW(model.parameters())
    names = {f"module.{name}" if wrapped else name: value for name, value in model.state_dict().items()}
    state = {"epoch": 3, "name": "run", "state_dict": names, "optimizer": optimizer.state_dict(), **more}
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_sparse_weights_without_a_config_need_moe_cfg(sparse, tmp_path, ending):
    path = str(tmp_path / f"weights.{ending}")
    if ending == "pt":
        torch.save(sparse.state_dict(), path)
    else:
        safetensors.torch.save_file(sparse.state_dict(), path)

    with pytest.raises(ValueError, match="has sparse layers but no config of them; pass moe_cfg"):
        clipup.create_model_and_transforms(NAME, path)
    loaded, *_ = clipup.create_model_and_transforms(NAME, path, moe_cfg=CONFIG)
    assert step0_difference(sparse, loaded) == 0
    with pytest.raises(ValueError, match=r"in_weight is \[3, 256, 64\] in the file, \[4, 256, 64\] in the model"):
        clipup.create_model_and_transforms(NAME, path, moe_cfg=CONFIG.replace(num_experts=4))


def test_a_weights_file_of_a_saved_model_is_read_with_the_config_beside_it(sparse, dense, tmp_path):
    save_pretrained(sparse, tmp_path, clipup.get_model_config(NAME))
    loaded, *_ = clipup.create_model_and_transforms(NAME, str(tmp_path / WEIGHTS_NAME))
    assert loaded.moe_config == CONFIG and step0_difference(sparse, loaded) == 0
    with pytest.raises(ValueError, match=r"another moe_cfg than the model has \(top_k\)"):
        clipup.load_checkpoint(upcycle(dense, CONFIG.replace(top_k=1 + CONFIG.top_k)), tmp_path / WEIGHTS_NAME)


def test_moe_cfg_for_a_dense_model_is_refused(dense, tmp_path):
    path = training_checkpoint(dense, tmp_path / "dense.pt", wrapped=False)
    for pretrained in (None, path):
        with pytest.raises(ValueError, match="moe_cfg does not apply here.*use clipup.upcycle"):
            clipup.create_model_and_transforms(NAME, pretrained, moe_cfg=CONFIG)


def test_load_checkpoint_loads_weights_or_leaves_the_model_unchanged(sparse, dense, tmp_path):
    path = training_checkpoint(sparse, tmp_path / "epoch_3.pt", wrapped=True)
    model = upcycle(dense, CONFIG)

    clipup.load_checkpoint(model, path)

    assert step0_difference(sparse, model) == 0
    torch.save(AveragedModel(dense).state_dict(), tmp_path / "average.pt")
    clipup.load_checkpoint(dense, tmp_path / "average.pt")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with pytest.raises(ValueError, match="epoch_3.pt do not fit .* missing from the file"):
        clipup.load_checkpoint(dense, path)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_training_checkpoints_load_with_their_config(request, tmp_path, wrapped, kind):
    model = request.getfixturevalue(kind)
    more = {"moe_cfg": CONFIG.to_dict()} if kind == "sparse" else {}
    path = training_checkpoint(model, tmp_path / "epoch_3.pt", wrapped, **more)
    loaded, *_ = clipup.create_model_and_transforms(NAME, path)
    assert step0_difference(model, loaded) == 0
    assert getattr(loaded, "moe_config", None) == (CONFIG if more else None)


def test_file_with_code_is_refused_without_running_it(tmp_path):
    malicious, trace = tmp_path / "stranger.pt", tmp_path / "executed"
    torch.save({"state_dict": tiny_clip().state_dict(), "epoch": MakesFile(trace)}, malicious)
    for read in (
        read_weights,
        lambda path: clipup.create_model_and_transforms(NAME, str(path)),
        lambda path: clipup.create_model_and_transforms(NAME, str(path), weights_only=False),
        lambda path: clipup.load_checkpoint(nn.Linear(2, 2), path),
    ):
        with pytest.raises(ValueError, match="stranger.pt|weights_only"):
            read(malicious)
    save_pretrained(tiny_clip(), tmp_path / "model", tiny_config())
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    malicious.rename(tmp_path / "model" / "open_clip_pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        clipup.create_model_and_transforms(str(tmp_path / "model"))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("text.pt", b"no weights", ValueError),
        ("list.pt", [1, 2], ValueError),
        ("empty.pt", {"epoch": 3}, ValueError),
        ("cut.safetensors", bytes(2), ValueError),
        ("none.pt", None, FileNotFoundError),
    ],
)
def test_files_without_weights_are_refused(tmp_path, name, content, error):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(error, match=name):
        read_weights(tmp_path / name)
