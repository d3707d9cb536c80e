"""What accelerate selects: timm's attentions, MLPs outside of blocks, and what its caller does not exclude."""

import copy
import pickle

import pytest
import torch
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from tiny_clip import draw_biases_and_norms, tiny_clip
from tiny_hugging_face import tiny_hugging_face
from torch import nn

import clipup
import clipup_kernels
from clipup.clip.inputs import random_inputs
from clipup.inference.prepared import Prepared, PreparedMLP
from clipup.inference.prepared_linear import PreparedLinear

needs_kernels = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ packs weights")
TOLERANCE = {(None, torch.float32): 1e-6, (None, torch.bfloat16): 0.02}


def assert_follows(fast, plain, *inputs):
    """Up to rounding in the weights' type, or up to quantization."""
    weights = next(module.quantize for module in fast.modules() if isinstance(module, Prepared))
    with torch.inference_mode():
        ours, theirs = fast(*inputs), plain(*inputs)
    assert (ours - theirs).norm() <= TOLERANCE.get((weights, theirs.dtype), 0.08) * theirs.norm()


def prepared_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Prepared)}


# ---------------------------------------------------------------- timm's attention

BLOCKS = {
    "EVA": lambda: EvaBlock(32, 2),
    "EVA without biases": lambda: EvaBlock(32, 2, qkv_bias=False),
    "EVA-02": lambda: EvaBlock(32, 2, qkv_fused=False, swiglu_mlp=True, scale_attn_inner=True),
    "DINOv3": lambda: EvaBlock(32, 2, num_prefix_tokens=1, init_values=0.5),
    "rope": lambda: EvaBlock(32, 2, attn_type="rope"),
    "post-norm": lambda: EvaBlockPostNorm(32, 2),
    "SwinV2": lambda: SwinTransformerV2Block(32, (4, 4), 2, window_size=4),
}


@needs_kernels
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_attention_of_timm_is_prepared(name, dtype, weights):
    torch.manual_seed(0)
    block = draw_biases_and_norms(BLOCKS[name]()).eval().to(dtype)
    with torch.no_grad():
        for linear in (part for part in block.attn.children() if isinstance(part, nn.Linear)):
            linear.weight.mul_(8)
    fast = clipup.accelerate(block, weights=weights)
    linears = {f"attn.{part}" for part, module in block.attn.named_children() if isinstance(module, nn.Linear)}
    assert prepared_names(fast) == {"mlp", *linears} and len(linears) in (2, 4)
    x = torch.randn(2, *((4, 4) if name == "SwinV2" else (16,)), 32, dtype=dtype)
    assert_follows(fast, block, x)
    assert_follows(pickle.loads(pickle.dumps(fast)), block, x)
    if weights is None:
        torch.testing.assert_close(fast.state_dict(), block.state_dict(), rtol=0, atol=0)


@needs_kernels
def test_attention_whose_projection_is_excluded_reads_its_weight():
    block = EvaBlock(32, 2).eval()
    fast = clipup.accelerate(block, exclude=["*.qkv"])
    assert prepared_names(fast) == {"attn.proj", "mlp"} and not fast.attn.qkv_bias_separate
    assert_follows(fast, block, torch.randn(2, 16, 32))


# ---------------------------------------------------------------- MLPs outside of blocks


class Mixed(nn.Module):
    """A sparse layer beside MLPs that no library knows."""

    def __init__(self):
        super().__init__()
        self.sparse = clipup.SparseMoE(32, 64)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)), nn.Linear(32, 32)])
        self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x):
        for layer in (self.sparse, self.mlp, *self.parts, self.head):
            x = layer(x)
        return x


def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.mark.parametrize("weights", [None, pytest.param("int8", marks=needs_kernels)])
def test_sequential_mlps_beside_a_sparse_layer_are_prepared(weights):
    model, x = mixed(), torch.randn(3, 5, 32)
    fast = clipup.accelerate(model, weights=weights)
    assert prepared_names(fast) == {"sparse", "mlp", "parts.0"}
    assert_follows(fast, model, x)
    assert_follows(copy.deepcopy(fast), model, x)
    reasons = {row.name: row.reason for row in clipup.accelerate_report(fast) if row.reason}
    assert set(reasons) == {"parts.1", "head.0", "head.2"}
    if weights is None:
        torch.testing.assert_close(fast.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_sequential_mlps_with_a_hook_or_in_a_model_with_another_forward_are_left():
    hooked, changed, dense = mixed(), mixed(), mixed()
    hooked.mlp[0].register_forward_hook(lambda module, args, output: 3 * output)
    changed.forward = lambda x: changed.mlp[0](changed.sparse(x))
    assert prepared_names(clipup.accelerate(hooked)) == {"sparse", "parts.0"}
    fast, x = clipup.accelerate(changed, inplace=True), torch.randn(3, 32)
    assert prepared_names(fast) == {"sparse", "parts.0"} and fast(x).shape == (3, 64)
    del dense.sparse
    with pytest.raises(ValueError, match="no sparse layer and no dense MLP"):
        clipup.accelerate(dense)


# ---------------------------------------------------------------- exclude


@needs_kernels
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["visual.*"], {"visual."}),
        (["visual"], {"visual."}),
        (["*.resblocks.1"], {"visual.transformer.resblocks.1.", "transformer.resblocks.1."}),
        (
            ["transformer.*.attn", "visual.conv?"],
            {f"transformer.resblocks.{i}.attn" for i in range(4)} | {"visual.conv1"},
        ),
        (["visual.*.mlp.c_proj"], {f"visual.transformer.resblocks.{i}.mlp" for i in (0, 2)}),  # 1 and 3 have experts
        (["visual.*.out_proj"], {f"visual.transformer.resblocks.{i}.attn" for i in range(4)}),
        (["visual.*.router"], set()),
    ],
)
def test_layers_whose_names_match_a_pattern_are_left(patterns, left, weights):
    model = clipup.upcycle(tiny_clip().eval(), clipup.MoEConfig())
    every = prepared_names(clipup.accelerate(model, weights=weights))
    if weights is None:  # attention beside an MLP that is left is left too
        left = {name.removesuffix("mlp") for name in left}
    fast = clipup.accelerate(model, weights=weights, exclude=patterns)
    assert prepared_names(fast) == {name for name in every if not name.startswith(tuple(left))}
    rows = {row.name: row.reason for row in clipup.accelerate_report(fast) if row.reason}
    assert set(rows) == every - prepared_names(fast)
    again = clipup.accelerate(fast, weights=weights)
    assert prepared_names(again) == every
    images, texts = random_inputs(model, 2)
    with torch.inference_mode():
        for ours, theirs in zip(fast(images, texts), model(images, texts), strict=True):
            assert (ours - theirs).norm() <= (1e-5 if weights is None else 0.05) * theirs.norm()


@pytest.mark.parametrize("part", ["intermediate", "intermediate.dense", "output", "output.dense"])
def test_of_an_mlp_of_two_modules_both_are_left(part):
    model = tiny_hugging_face("BertModel")
    fast = clipup.accelerate(model, exclude=[f"encoder.layer.0.{part}"])
    changed, other = fast.encoder.layer[:2]
    assert not any(isinstance(module, PreparedMLP) for module in changed.modules())
    assert type(changed.output.dense) is nn.Linear and isinstance(other.intermediate, PreparedMLP)
    assert isinstance(other.output.dense, PreparedLinear)


def test_a_shared_layer_is_excluded_by_each_of_its_names():
    model = mixed()
    model.again = model.mlp
    assert prepared_names(clipup.accelerate(model, exclude=["again"])) == {"sparse", "parts.0"}


def test_a_shared_expert_is_excluded_alone():
    layer, x = clipup.SparseMoE(32, 64, shared_expert=True).eval(), torch.randn(5, 32)
    fast = clipup.accelerate(layer, exclude=["shared"])
    assert prepared_names(fast) == {""}
    assert_follows(fast, layer, x)
    torch.testing.assert_close(fast.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("exclude", [["mlp", "mpl.*"], ["sparse.in_weight"], "mlp"])
def test_a_pattern_that_matches_nothing_is_refused_by_name(exclude):
    model = mixed()
    with pytest.raises(ValueError, match="exclude has '(mpl|sparse.in_weight|m)"):
        clipup.accelerate(model, inplace=True, exclude=exclude)
    assert not prepared_names(model)


def test_a_pattern_that_matches_a_prepared_layer_is_refused():
    fast = clipup.accelerate(mixed(), exclude=["sparse"])
    assert prepared_names(clipup.accelerate(fast, exclude=["sparse"])) == prepared_names(fast)
    with pytest.raises(ValueError, match="exclude names mlp, which was prepared before"):
        clipup.accelerate(fast, exclude=["mlp"])


def test_an_error_about_nothing_to_prepare_names_what_was_excluded():
    with pytest.raises(ValueError, match="parts.0: Sequential, left: excluded"):
        clipup.accelerate(mixed(), exclude=["*"])
