"""Every model config in open_clip, on the meta device: what upcycling replaces, or which block it refuses."""

import json
from pathlib import Path

import open_clip
import open_clip.hf_model
import pytest
import torch
import transformers
from tiny_families import bert_config, modern_bert_config, mt5_config

from clipup import MoEConfig, moe_layers, upcycle
from clipup.clip.towers import tower_blocks, tower_module, towers
from clipup.models.factory import create_on_meta
from clipup.models.model_names import get_model_config

CONFIG = MoEConfig.clip_up(num_experts=2)


def _is_clip(config):
    return {"vision_cfg", "text_cfg"} <= set(config) and "genlip_cfg" not in config


CONFIG_FILES = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
NAMES = [path.stem for path in CONFIG_FILES if _is_clip(json.loads(path.read_text()))]

REFUSED = {"image": {"ModifiedResNet", "RepMixerBlock"}, "text": {"M2M100EncoderLayer"}, "decoder": set()}
"""Classes of towers and blocks that are refused."""

STAND_INS = {
    "google/mt5": lambda: mt5_config("gated-gelu"),
    "roberta": lambda: bert_config("Roberta"),
    "xlm-roberta": lambda: bert_config("XLMRoberta"),
    "Alibaba-NLP/gte-modernbert": modern_bert_config,
    "facebook/nllb": lambda: transformers.M2M100Config(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48
    ),
}
"""Small configs of the same architectures, instead of Hugging Face configs, which need a download."""


@pytest.fixture
def without_network(monkeypatch):
    def stand_in(name, **options):
        return next(config for start, config in STAND_INS.items() if name.startswith(start))()

    monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", stand_in)


@pytest.fixture(autouse=True)
def without_initialization(monkeypatch):
    """Skips random initialization, which takes more than half of the time even for meta tensors without values."""
    for name in ("normal_", "uniform_", "erfinv_", "clamp_"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, **options: tensor)


def first_of_each_kind():
    """All configs. Those after the first with blocks of the same kind, with or without a decoder, are slow tests."""
    seen = set()
    for name in NAMES:
        config = get_model_config(name)
        image, text = config["vision_cfg"], config["text_cfg"]
        kind = (
            image.get("timm_model_name", "").partition("_")[0],
            "timm_model_kwargs" in image,
            type(image.get("layers")),
        )
        kind += text.get("hf_model_name", "").partition("/")[0], text.get("text_arch")
        yield pytest.param(name, marks=[pytest.mark.slow] if kind in seen else [])
        seen.add(kind)


@pytest.mark.parametrize("name", first_of_each_kind())
def test_config_is_upcycled_or_its_block_is_refused(name, without_network):
    model = create_on_meta(name)
    wanted = []
    for tower in towers(model):
        refused = REFUSED[tower] & {type(module).__name__ for module in tower_module(model, tower)[1].modules()}
        if refused:
            with pytest.raises(TypeError, match=f"{refused.pop()}.* leave the {tower} tower dense"):
                upcycle(model, CONFIG.replace(towers=(tower,)), inplace=True)
        else:
            wanted.append(tower)
    chosen = [name for tower in wanted for name in list(tower_blocks(model, tower))[1::2]]
    upcycle(model, CONFIG.replace(towers=tuple(wanted)), inplace=True)
    layers = moe_layers(model)
    assert len(layers) == len(chosen) > 0
    assert all(any(layer.startswith(f"{block}.") for block in chosen) for layer in layers)
