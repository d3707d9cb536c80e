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
from clipup.clip.towers import tower_blocks, towers
from clipup.dense.mlp_families import find_mlp
from clipup.models.factory import create_on_meta
from clipup.models.model_names import get_model_config

CONFIG = MoEConfig.clip_up(num_experts=2)


def _is_clip(config):
    return {"vision_cfg", "text_cfg"} <= set(config) and "genlip_cfg" not in config


CONFIG_FILES = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
NAMES = [path.stem for path in CONFIG_FILES if _is_clip(json.loads(path.read_text()))]

NATIVE = "ResidualAttentionBlock/Sequential"
IMAGE = {
    "convnext": "ConvNeXtBlock/Mlp",
    "eva_giant": "EvaBlock/Mlp",
    "eva02_enormous": "EvaBlockPostNorm/Mlp",
    "eva02_": "EvaBlock/SwiGLU",
    "fastvit": "RepMixerBlock is refused",
    "naflexvit_": "Block/Mlp",
    "swin": "SwinTransformerBlock/Mlp",
    "vit_pe_core": "EvaBlock/Mlp",
    "vit_relpos": "RelPosBlock/Mlp",
    "vit_": "Block/Mlp",
    "vitamin": "Block/GeGluMlp",
}
"""The image tower's blocks and MLPs by prefix of the timm model's name. The first match counts."""

TEXT = {
    "google/mt5": "MT5Block/MT5DenseGatedActDense",
    "roberta": "RobertaLayer/RobertaIntermediate",
    "xlm-roberta": "XLMRobertaLayer/XLMRobertaIntermediate",
    "facebook/nllb": "M2M100EncoderLayer is refused",
    "Alibaba-NLP/gte-modernbert": "ModernBertEncoderLayer/ModernBertMLP",
}
"""The same for the text tower, by prefix of the Hugging Face model's name."""

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


def by_prefix(table, name):
    return next(value for start, value in table.items() if name.startswith(start))


def expected(name):
    """The expected kinds of block in the image and text towers."""
    config = get_model_config(name)
    image, text = config["vision_cfg"], config["text_cfg"]
    image_blocks, text_blocks = NATIVE, NATIVE
    if image.get("timm_model_kwargs", {}).get("swiglu_mlp"):
        image_blocks = "EvaBlock/GluMlp"
    elif "timm_model_name" in image:
        image_blocks = by_prefix(IMAGE, image["timm_model_name"])
    elif isinstance(image["layers"], list):
        image_blocks = "ModifiedResNet is refused"
    if "hf_model_name" in text:
        text_blocks = by_prefix(TEXT, text["hf_model_name"])
    if text.get("text_arch") == "modern":
        text_blocks = "ModernTextBlock/SwiGLU"
    return image_blocks, text_blocks


@pytest.fixture
def without_network(monkeypatch):
    monkeypatch.setattr(
        open_clip.hf_model.AutoConfig, "from_pretrained", lambda name, **options: by_prefix(STAND_INS, name)()
    )


@pytest.fixture(autouse=True)
def without_initialization(monkeypatch):
    """Skips random initialization, which takes more than half of the time even for meta tensors without values."""
    for name in ("normal_", "uniform_", "erfinv_", "clamp_"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, **options: tensor)


def kinds(blocks):
    found = {name: find_mlp(block) for name, block in blocks.items()}
    return {f"{type(block).__name__}/{type(found[name].module).__name__}" for name, block in blocks.items()}


def first_of_each_kind():
    """All configs. Those after the first with the same kinds of block, with or without a decoder, are slow tests."""
    seen = set()
    for name in NAMES:
        kind = (*expected(name), "multimodal_cfg" in get_model_config(name))
        yield pytest.param(name, marks=[pytest.mark.slow] if kind in seen else [])
        seen.add(kind)


@pytest.mark.parametrize("name", first_of_each_kind())
def test_config_is_upcycled_or_its_block_is_refused(name, without_network):
    model = create_on_meta(name)
    wanted = []
    for tower, kind in zip(("image", "text"), expected(name), strict=True):
        if kind.endswith(" is refused"):
            with pytest.raises(TypeError, match=f"{kind.split()[0]}.* leave the {tower} tower dense"):
                upcycle(model, CONFIG.replace(towers=(tower,)), inplace=True)
        else:
            assert kinds(tower_blocks(model, tower)) == {kind}
            wanted.append(tower)
    if "decoder" in towers(model):
        assert kinds(tower_blocks(model, "decoder")) == {NATIVE}
        wanted.append("decoder")
    chosen = [name for tower in wanted for name in list(tower_blocks(model, tower))[1::2]]
    upcycle(model, CONFIG.replace(towers=tuple(wanted)), inplace=True)
    layers = moe_layers(model)
    assert len(layers) == len(chosen) > 0
    assert all(any(layer.startswith(f"{block}.") for block in chosen) for layer in layers)
