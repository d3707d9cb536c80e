"""Int8 weights: quantized by output channel, their inputs by row at every call, sums exact."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from moe_cases import DTYPES, SHAPES, experts_case, pairwise, randn

import clipup_kernels as ck
from clipup_kernels.backends import extension

pytestmark = pytest.mark.skipif(extension.NATIVE is None, reason="there is no compiled extension")
MATRICES = ("in_weight", "out_weight", "gate_weight")


def fake_quantized(x):
    """x [.., I] in float64, its rows rounded to 127 steps of their largest entry."""
    most = x.float().abs().amax(-1, keepdim=True)
    return (x.double() * (127 / most).double()).round() * (most / 127).double()


def around_their_middle(x):
    """The same after the middle of each row's least and largest entry was subtracted, and added again."""
    middle = (x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True)) / 2
    return fake_quantized(x - middle).nan_to_num() + middle.double()


def oracle(x, in_weight, in_bias, out_weight, out_bias, activation, gate_weight=None, gate_bias=None):
    """One MLP with quantized weights and inputs, in float64."""

    def linear(rows, weight, bias):
        return fake_quantized(rows) @ fake_quantized(weight).T + bias.double()

    hidden = linear(x, in_weight, in_bias)
    gate = hidden if gate_weight is None else linear(x, gate_weight, gate_bias)
    hidden = ck.reference.activate(gate, activation) * (1 if gate_weight is None else hidden)
    rows, quantized_out = around_their_middle(hidden.float()), fake_quantized(out_weight)
    return rows @ quantized_out.T + out_bias.double()


def int8(arguments):
    return arguments | {
        name: ck.pack_weight(arguments[name], "int8") for name in MATRICES if arguments.get(name) is not None
    }


def linear(x, weight, bias=None, scale=None):
    """``grouped_linear`` with one expert."""
    packed = weight if isinstance(weight, ck.PackedWeight) else ck.pack_weight(weight, "int8", scale)
    return ck.grouped_linear(x, packed, bias, torch.tensor([0, len(x)], dtype=torch.int32))


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "shape", [(3, 37, 19), (37, 19), (2, 64, 32), (1, 1, 1), (2, 0, 3), (0, 5, 3), (4, 33, 0)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_rounded_to_127_steps_of_its_channel(dtype, shape):
    weight = randn(*shape, dtype=dtype, seed=0)
    packed = ck.pack_weight(weight, "int8")
    assert (packed.shape, packed.dtype, packed.quantization) == (shape, dtype, "int8")
    back = ck.unpack_weight(packed)
    assert back.shape == weight.shape and back.dtype == dtype
    if weight.numel():
        expected = fake_quantized(weight)
        assert (back.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 13, 16, 43, 99])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_layer_is_exact_for_its_integers_and_a_row_does_not_depend_on_the_others(dtype, rows):
    x, weight, bias = randn(rows, 131, dtype=dtype, seed=1), randn(1, 70, 131, dtype=dtype), randn(1, 70, dtype=dtype)
    y = linear(x, weight, bias)
    expected = fake_quantized(x) @ fake_quantized(weight[0]).T + bias[0].double()
    assert (y.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert torch.equal(y, torch.cat([linear(row[None], weight, bias) for row in x]))


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-35, 1e37])
def test_rows_of_any_size_are_scaled(size):
    x, weight, bias = randn(6, 40, seed=1) * size, randn(1, 33, 40) / 40, randn(1, 33)
    y, expected = linear(x, weight, bias), x.double() @ weight[0].double().T + bias.double()
    assert y.isfinite().all()
    assert (y.double() - expected).abs().max() <= 2e-2 * expected.abs().max()


CALL = """
import pickle, sys, torch, clipup_kernels as ck
x, weight, bias = pickle.load(sys.stdin.buffer)
packed = ck.pack_weight(weight, "int8", input_offset=x[0])
y = ck.grouped_linear(x, packed, bias, torch.tensor([0, len(x)], dtype=torch.int32))
pickle.dump((y, packed), sys.stdout.buffer)
"""


def on_tier(tier, *arguments):
    return subprocess.run(
        [sys.executable, "-c", CALL], input=pickle.dumps(arguments), env=os.environ | {"CLIPUP_CPU_ISA": tier},
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_tiers_agree_and_read_each_others_weights():
    x, weight, bias = randn(30, 70, seed=1), randn(1, 45, 70), randn(1, 45)
    refusal = on_tier("none", x, weight, bias).stderr.decode()
    tiers = refusal.split("one that this CPU has (")[1].split(")")[0].split(", ")
    assert "portable" in tiers
    packed = ck.pack_weight(weight, "int8", input_offset=x[0])
    here = linear(x, packed, bias)
    for tier in tiers:
        there, foreign = pickle.loads(on_tier(tier, x, weight, bias).stdout)
        assert (there - here).abs().max() <= (1e-6 if tier != "portable" else 1e-2) * here.abs().max(), tier
        again = ck.pack_weight(foreign)
        assert torch.equal(ck.unpack_weight(foreign), ck.unpack_weight(packed)), tier
        assert again.layout == packed.layout and torch.equal(again.block, packed.block), tier
        if foreign.layout != packed.layout:
            with pytest.raises(ValueError, match=r"pack_weight\(packed\)"):
                linear(x, foreign, bias)


def test_an_input_scale_balances_inputs_and_weights():
    x, weight, scale = randn(20, 64, seed=1), randn(1, 48, 64), torch.ones(64)
    x[:, :2] *= 100
    weight[..., :2] /= 100
    scale[:2] = 0.01
    exact = x.double() @ weight[0].double().T
    plain, balanced = (relative_error(linear(x, weight, None, given), exact) for given in (None, scale))
    assert plain > 10 * balanced and balanced < 2e-2
    back = ck.unpack_weight(ck.pack_weight(weight, "int8", scale))
    assert (back - weight).abs().max() <= weight.abs().max() / 127


def test_an_input_offset_is_subtracted_from_rows_before_they_are_quantized():
    x, weight, offset = randn(20, 40, seed=1), randn(3, 48, 40), torch.zeros(3, 40)
    x[:, 7], offset[:, 7] = x[:, 7] + 100, 100
    offsets = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    packed = ck.pack_weight(weight, "int8", input_offset=offset)
    found = ck.grouped_linear(x, packed, None, offsets)
    expected = torch.cat([(x[:5] - offset[0]) @ weight[0].T, (x[5:] - offset[2]) @ weight[2].T]).double()
    assert relative_error(found, expected) < 1e-2
    same = ck.grouped_linear(x - offset[0], ck.pack_weight(weight, "int8"), None, offsets)
    assert relative_error(found, same.double()) < 1e-5
    assert torch.equal(ck.unpack_weight(packed), ck.unpack_weight(ck.pack_weight(weight, "int8")))


@pytest.mark.parametrize("case", pairwise(dtype=DTYPES, activation=ck.ACTIVATIONS, gated=(False, True)))
def test_an_mlp_follows_the_oracle(case):
    experts = experts_case("odd", "dropless", **case).arguments
    one = {name: value[0] if torch.is_tensor(value) else value for name, value in experts.items()}
    one = {name: value for name, value in one.items() if name not in ("gates", "plan")} | {"x": experts["x"]}
    # The hidden activations are rounded to x's type before they are quantized, which moves a few to the next step.
    assert relative_error(ck.dense_mlp(**int8(one)), oracle(**one)) <= 8e-3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.tokens])
def test_experts_are_close_to_those_with_plain_weights(shape, gated):
    plain = experts_case(shape, "dropless", gated=gated).arguments
    assert relative_error(ck.expert_mlp(**int8(plain)), ck.expert_mlp(**plain).double()) <= 3e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row_and_channel(value):
    x, weight, bias = randn(20, 40, seed=1), randn(1, 33, 40), randn(1, 33)
    clean = linear(x, weight, bias)
    x[7, 39] = value
    weight[0, 5, 3] = torch.nan
    y = linear(x, weight, bias)
    rows, channels = torch.arange(20) != 7, torch.arange(33) != 5
    assert y[7].isnan().all() and y[:, 5].isnan().all()
    assert torch.equal(y[rows][:, channels], clean[rows][:, channels])


WEIGHT = randn(2, 33, 40)


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("int4", (WEIGHT, "int4")),
        ("float64", (WEIGHT.double(), "int8")),
        ("quantize", (ck.pack_weight(WEIGHT), "int8")),
        ("at most 65536", (torch.zeros(1, 1, 65537), "int8")),
        ("input_scale", (WEIGHT, None, torch.ones(40))),
        ("input_scale", (WEIGHT, "int8", torch.ones(39))),
        ("input_scale", (WEIGHT, "int8", torch.full((40,), torch.nan))),
        ("input_scale", (WEIGHT, "int8", torch.zeros(40))),
        ("input_offset", (WEIGHT, None, None, torch.zeros(40))),
        ("input_offset", (WEIGHT, "int8", None, torch.zeros(3, 40))),
        ("input_offset", (WEIGHT, "int8", None, torch.full((40,), torch.inf))),
        ("input_offset", (ck.pack_weight(WEIGHT), None, None, torch.zeros(40))),
    ],
)
def test_wrong_calls_are_refused_by_name(named, arguments):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=named):
        ck.pack_weight(*arguments)


@pytest.mark.parametrize(
    ("named", "name", "change"),
    [
        ("out_weight", "out_weight", lambda weight: ck.pack_weight(weight)),
        ("packed_gate", "gate_weight", lambda weight: ck.pack_weight(weight, "int8", torch.full((19,), 2.0))),
        ("takes .* bytes", "in_weight", lambda weight: with_block(weight, lambda block: block[:-4])),
        (
            "takes .* bytes",
            "in_weight",
            lambda weight: with_block(weight, lambda block: torch.stack([block] * 2, 1)[:, 0]),
        ),
    ],
)
def test_experts_of_other_layouts_or_scales_or_without_all_their_memory_are_refused(named, name, change):
    plain = experts_case("odd", "dropless", gated=True).arguments
    with pytest.raises(ValueError, match=named):
        ck.expert_mlp(**int8(plain) | {name: change(plain[name])})


def with_block(weight, change):
    packed = ck.pack_weight(weight, "int8")
    return packed._replace(block=change(packed.block))
