import dataclasses
import importlib
from collections import OrderedDict

import open_clip.transformer
import pytest
import timm.layers
import torch
import torchvision
import transformers
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp
from tiny_families import HAS_MODERN_TEXT, draw_biases_and_norms
from torch import nn
from transformers.models.modernbert import modeling_modernbert
from transformers.models.mt5 import modeling_mt5

from clipup import MoEConfig, SparseMoE
from clipup.dense.mlp_families import find_mlp, read_mlp
from clipup_kernels.reference import activate

D, H = 12, 20
DROPOUT = nn.Dropout(0.1)


def open_clip_mlp(activation=None, **extra):
    mlp = nn.Sequential()
    for name, part in {
        "c_fc": nn.Linear(D, H),
        "gelu": activation or nn.GELU(),
        **extra,
        "c_proj": nn.Linear(H, D),
    }.items():
        mlp.add_module(name, part)
    return mlp


def mt5_mlp(feed_forward):
    config = transformers.MT5Config(d_model=D, d_ff=H, feed_forward_proj=feed_forward)
    return modeling_mt5.MT5LayerFF(config).DenseReluDense


def hugging_face_mlp(model, name, config, **options):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    options = {"hidden_size": D, "intermediate_size": H, **options}
    return getattr(module, name)(getattr(transformers, config)(**options))


HUGGING_FACE_MLPS = [
    hugging_face_mlp("clip", "CLIPMLP", "CLIPVisionConfig"),
    hugging_face_mlp("siglip", "SiglipMLP", "SiglipVisionConfig"),
    hugging_face_mlp("siglip2", "Siglip2MLP", "Siglip2VisionConfig"),
    hugging_face_mlp("vit", "ViTMLP", "ViTConfig"),
    hugging_face_mlp("dinov2", "Dinov2MLP", "Dinov2Config"),
    hugging_face_mlp("dinov2", "Dinov2SwiGLUFFN", "Dinov2Config"),
    hugging_face_mlp("dinov3_vit", "DINOv3ViTMLP", "DINOv3ViTConfig"),
    hugging_face_mlp("dinov3_vit", "DINOv3ViTGatedMLP", "DINOv3ViTConfig", mlp_bias=True),
    hugging_face_mlp("llama", "LlamaMLP", "LlamaConfig", mlp_bias=True, num_attention_heads=2),
    hugging_face_mlp("mistral", "MistralMLP", "MistralConfig", num_attention_heads=2),
    hugging_face_mlp("qwen2", "Qwen2MLP", "Qwen2Config"),
    hugging_face_mlp("qwen3", "Qwen3MLP", "Qwen3Config"),
    hugging_face_mlp("gemma", "GemmaMLP", "GemmaConfig"),
]

ACTIVATIONS = [
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (open_clip.transformer.QuickGELU(), "quick_gelu"),
    (nn.ReLU(), "relu"),
    (nn.SiLU(), "silu"),
    (timm.layers.GELU(), "gelu"),
    (timm.layers.GELUTanh(), "gelu_tanh"),
    (timm.layers.QuickGELU(), "quick_gelu"),
    (timm.layers.Swish(), "silu"),
    (transformers.activations.ACT2FN["gelu"], "gelu"),
    (transformers.activations.ACT2FN["gelu_new"], "gelu_tanh"),
    (transformers.activations.ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
    (transformers.activations.ACT2FN["quick_gelu"], "quick_gelu"),
    (transformers.activations.ACT2FN["silu"], "silu"),
    (transformers.activations.ACT2FN["relu"], "relu"),
]


@pytest.mark.parametrize(("module", "name"), ACTIVATIONS)
def test_activation_is_read_as_what_it_computes(module, name):
    z = torch.linspace(-4, 4, 101)
    assert read_mlp(open_clip_mlp(module)).activation == name
    torch.testing.assert_close(activate(z, name), module(z.clone()))


@pytest.mark.parametrize(
    "mlp",
    [
        open_clip_mlp(),
        open_clip_mlp(ln=nn.Identity()),
        timm.layers.Mlp(D, H),
        timm.layers.Mlp(D, H, bias=False, act_layer=timm.layers.QuickGELU),
        open_clip_mlp(ln=open_clip.transformer.LayerNorm(H)),
        open_clip_mlp(ln=open_clip.transformer.LayerNormFp32(H)),
        timm.layers.Mlp(D, H, norm_layer=nn.LayerNorm),
        timm.layers.SwiGLU(D, H),
        timm.layers.SwiGLU(D, H, bias=False),
        timm.layers.SwiGLU(D, H, norm_layer=timm.layers.LayerNorm),
        timm.layers.GluMlp(D, 2 * H, act_layer=nn.GELU),
        timm.layers.GluMlp(D, 2 * H, act_layer=nn.SiLU, gate_last=False, norm_layer=timm.layers.LayerNormFp32),
        timm.layers.GluMlp(D, 2 * H, act_layer=nn.SiLU, bias=False),
        mt5_mlp("relu"),
        mt5_mlp("gated-gelu"),
        mt5_mlp("gated-silu"),
        modeling_modernbert.ModernBertMLP(transformers.ModernBertConfig(hidden_size=D, intermediate_size=H)),
        *([open_clip.transformer.SwiGLU(D, H)] if HAS_MODERN_TEXT else []),
        *([open_clip.transformer.SwiGLU(D, H, bias=False)] if HAS_MODERN_TEXT else []),
        nn.Sequential(OrderedDict(c_fc=nn.Linear(D, H), act=nn.GELU(), c_proj=nn.Linear(H, D))),
        torchvision.models.vision_transformer.MLPBlock(D, H, dropout=0.0),
        nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)),
        nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.2), nn.Linear(H, D), nn.Dropout(0.0)),
        nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Dropout(0.2), nn.LayerNorm(H), nn.Linear(H, D)),
        *HUGGING_FACE_MLPS,
    ],
    ids=lambda mlp: type(mlp).__name__,
)
def test_mlp_read_computes_what_the_module_does(mlp):
    draw_biases_and_norms(mlp.eval())
    x = torch.randn(9, D)
    layer = SparseMoE.from_dense(mlp, MoEConfig(num_experts=3))
    torch.testing.assert_close(layer(x), mlp(x))


def test_an_mlp_in_two_modules_is_read_from_both():
    module = importlib.import_module("transformers.models.bert.modeling_bert")
    config = transformers.BertConfig(hidden_size=D, intermediate_size=H)
    first, second = module.BertIntermediate(config), module.BertOutput(config)
    x = torch.randn(9, D)
    layer = SparseMoE.from_dense((first, second), MoEConfig(num_experts=3))
    torch.testing.assert_close(layer(x), second.dense(first(x)))
    assert layer.training and not SparseMoE.from_dense((first.eval(), second.eval())).training
    with pytest.raises(TypeError, match="cannot read .*BertIntermediate as an MLP"):
        SparseMoE.from_dense(first)


class LooksLikeMlp(timm.layers.Mlp):
    """Has all the attributes of a timm Mlp and computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class LooksLikeABlock(Block):
    """Has ``.mlp`` and may use it in any way."""


class WithoutMlp(nn.Module):
    """A block of some other kind."""


def hooked_mlp():
    mlp = open_clip_mlp()
    mlp.c_fc.register_forward_hook(lambda *_: None)
    return mlp


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (LooksLikeMlp(D, H), r"cannot read .*LooksLikeMlp as an MLP; .* DenseMLP .*docs/layer\.md"),
        (nn.Sequential(nn.Linear(D, D)), r"cannot read an nn.Sequential of Linear as an MLP.* DenseMLP .*layer\.md"),
        (
            nn.Sequential(nn.Linear(D, H), nn.GELU(), DROPOUT, nn.Linear(H, D), DROPOUT),
            r"4=Dropout\(p=0.1, .*after its projections: experts have no dropout",
        ),
        (
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.LayerNorm(H), nn.Dropout(0.1), nn.Linear(H, D)),
            "cannot read an nn.Sequential of Linear, GELU, LayerNorm, Dropout, Linear",
        ),
        (
            nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D)),
            "cannot read an nn.Sequential of Linear, ReLU, Linear, ReLU, Linear",
        ),
        (
            nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, D)),
            "cannot read an nn.Sequential of Linear, BatchNorm1d, ReLU, Linear",
        ),
        (nn.Sequential(nn.Linear(D, H), nn.ReLU(), DROPOUT), "cannot read an nn.Sequential of Linear, ReLU, Dropout"),
        (nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D, False)), "a bias in only some of its projections"),
        (open_clip_mlp(ln=nn.RMSNorm(H)), r"with a torch.nn.modules.normalization.RMSNorm \(ln\) between its proj"),
        (open_clip_mlp(ln=nn.LayerNorm(H, bias=False)), r"with a layer norm \(ln\) that lacks weight or bias"),
        (open_clip_mlp(nn.GELU(approximate="fast")), "activation .*approximate='fast'.*, expected one of .*gelu_tanh"),
        (open_clip_mlp(nn.Tanh()), r"activation 'torch\.nn\.modules\.activation\.Tanh', expected one of .*gelu"),
        (timm.layers.Mlp(D, H, norm_layer=timm.layers.RmsNorm), r"RmsNorm \(norm\) between its projections"),
        (
            timm.layers.Mlp(D, H, drop=0.1),
            r"drop2=Dropout\(p=0.1, .*after its projections: experts have no dropout",
        ),
        (
            nn.Sequential(OrderedDict(c_fc=nn.Linear(D, H), gelu=nn.GELU(), c_proj=nn.LazyLinear(D))),
            "Linear, GELU, LazyLinear",
        ),
        (hooked_mlp(), "with hooks or a forward of its own on c_fc"),
        (timm.layers.Mlp(D, H, D + 1), "out_weight .* experts end as wide as they start"),
        (timm.layers.GluMlp(D, 2 * H), r"activation 'torch\.nn\.modules\.activation\.Sigmoid'"),
        (timm.layers.GluMlp(D, 2 * H, use_conv=True), "projection is a torch.nn.modules.conv.Conv2d"),
    ],
)
def test_unsupported_mlps_are_refused_by_name(mlp, message):
    with pytest.raises(TypeError, match=message):
        read_mlp(mlp)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (LooksLikeABlock(D, 2), r"MLP of a .*LooksLikeABlock with an mlp of class timm.layers.mlp.Mlp; .* DenseMLP"),
        (
            Block(D, 2, mlp_layer=LooksLikeMlp),
            "MLP of a timm.models.vision_transformer.Block with an .*LooksLikeMlp",
        ),
        (WithoutMlp(), "MLP of a .*WithoutMlp; "),
    ],
)
def test_blocks_are_matched_by_class_and_not_by_attribute(block, message):
    with pytest.raises(TypeError, match=message):
        find_mlp(block)


def test_dropout_between_the_projections_is_kept_in_training():
    mlp = timm.layers.Mlp(D, H, drop=(0.25, 0.0))
    layer = SparseMoE.from_dense(mlp)
    assert layer.dropout == 0.25
    x = torch.randn(5, D)
    torch.testing.assert_close(layer.eval()(x), mlp.eval()(x))
    assert mt5_mlp("relu").dropout.p == read_mlp(mt5_mlp("relu")).dropout == 0.1
    assert read_mlp(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.3), nn.Linear(H, D))).dropout == 0.3


def test_norm_in_front_of_the_projections_is_left_to_upcycle():
    mlp = GeGluMlp(D, H)
    draw_biases_and_norms(mlp)
    with pytest.raises(
        TypeError, match="has a norm in front of its projections, which is not part of an expert; use clip"
    ):
        SparseMoE.from_dense(mlp)
    dense = read_mlp(mlp)
    layer = SparseMoE.from_dense(dataclasses.replace(dense, input_norm=None))
    x = torch.randn(5, D)
    torch.testing.assert_close(layer(dense.input_norm(x)), mlp(x))
