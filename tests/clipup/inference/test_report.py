"""accelerate_report: what was prepared, what was left and why; and the reasons in the error where nothing was."""

import copy
import pickle

import pytest
import timm
import torch
from tiny_clip import tiny_clip
from tiny_families import timm_model
from tiny_hugging_face import tiny_hugging_face
from torch import nn

import clipup
import clipup_kernels

needs_kernels = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ packs weights")


def report(model):
    return {row.name: row for row in clipup.accelerate_report(model)}


def with_adapters(name, target):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_hugging_face(name), peft.LoraConfig(r=2, target_modules=[target]))


@needs_kernels
@pytest.mark.parametrize("weights", [None, "int8"])
def test_every_layer_of_a_clip_is_in_the_report_with_the_type_of_its_weights(weights):
    model = clipup.upcycle(tiny_clip().eval(), clipup.MoEConfig())
    fast = clipup.accelerate(model, weights=weights)
    rows = report(fast)
    blocks = [f"{tower}transformer.resblocks.{index}" for tower in ("visual.", "") for index in range(4)]
    assert set(rows) == {"visual.conv1", *(f"{block}.{part}" for block in blocks for part in ("attn", "mlp"))}
    assert {row.weights for row in rows.values()} == {weights or "float32"}
    assert {row.reason for row in rows.values()} == {None}
    assert rows["visual.transformer.resblocks.1.mlp"].layer == "PreparedMoE"
    assert report(copy.deepcopy(fast)) == report(pickle.loads(pickle.dumps(fast))) == rows
    fast.visual.transformer.resblocks[0].mlp = model.visual.transformer.resblocks[0].mlp
    (changed,) = {*report(fast).values()} - {*rows.values()}
    assert str(changed) == (
        "visual.transformer.resblocks.0.mlp: Sequential, left: it can be prepared: clipup.accelerate(model)"
    )


@needs_kernels
def test_layers_that_are_left_are_in_the_report_with_the_reason():
    swin = report(clipup.accelerate(timm_model("SwinTransformerV2Block/Mlp").eval()))
    assert "Sequential, not in a supported" in swin["layers.0.blocks.0.attn.cpb_mlp.0"].reason
    bert = tiny_hugging_face("BertModel")
    bert.encoder.layer[1].output.register_buffer("amax", torch.ones(3))
    bert.encoder.layer[0].output.dense.register_buffer("amax", torch.ones(3))
    rows = report(clipup.accelerate(bert))
    assert rows["encoder.layer.1.intermediate"].reason is None
    assert "tensors" in rows["encoder.layer.0.intermediate"].reason
    assert "in int8 only" in rows["encoder.layer.0.attention.self.query"].reason
    assert "BertPooler, not in a supported" in rows["pooler.dense"].reason


def mlp(bias=True):
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=bias))


def mlp_with_a_buffer():
    made = mlp()
    made[0].register_buffer("amax", torch.ones(3))
    return made


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (lambda: mlp(bias=False), "a bias in only some of its projections"),
        (mlp_with_a_buffer, "tensors"),
        (lambda: nn.Sequential(*mlp(), nn.ReLU(), nn.Linear(8, 8)), "Linear, GELU, Linear, ReLU, Linear as an MLP"),
        (lambda: timm.layers.Mlp(8, 16, norm_layer=nn.LayerNorm), "a norm between its projections"),
    ],
)
def test_the_layers_of_a_single_mlp_that_is_left_have_its_reason(left, reason):
    with pytest.raises(ValueError, match=reason):
        clipup.accelerate(left())
    if type(left()) is nn.Sequential:
        rows = report(clipup.accelerate(nn.Sequential(clipup.SparseMoE(8, 16), left())))
        assert all(reason in row.reason for name, row in rows.items() if name.startswith("1."))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: with_adapters("CLIPModel", "fc1"),
            "layers.3.mlp: CLIPMLP, left: it has PEFT's adapters; merge them first",
        ),
        (lambda: timm_model("Block/Mlp, normed"), "blocks.3.mlp: Mlp, left: a norm between its projections"),
    ],
)
def test_the_error_about_a_model_with_nothing_to_prepare_says_why(model, reason):
    with pytest.raises(ValueError, match=f"no sparse layer and no dense MLP to prepare(.|\n)*{reason}"):
        clipup.accelerate(model())
