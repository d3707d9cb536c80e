"""Int8 weights: quantized by output channel, their inputs by row at every call, sums exact."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from moe_cases import DTYPES, SHAPES, covering, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels.backends import extension

pytestmark = pytest.mark.skipif(extension.NATIVE is None, reason="there is no compiled extension")
MATRICES = ("in_weight", "out_weight", "gate_weight")


def quantized(x):
    """x [.., I] -> the integers and the scales of its rows, in float64."""
    most = x.float().abs().amax(-1, keepdim=True)
    return (x.double() * (127 / most).double()).round(), (most / 127).double()


def fake_quantized(x):
    integers, scale = quantized(x)
    return integers * scale


def oracle(x, in_weight, in_bias, out_weight, out_bias, activation, gate_weight=None, gate_bias=None):
    """One MLP with quantized weights and inputs, in float64."""

    def linear(rows, weight, bias):
        y = fake_quantized(rows) @ fake_quantized(weight).T
        return y if bias is None else y + bias.double()

    act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    hidden = linear(x, in_weight, in_bias)
    hidden = act(hidden) if gate_weight is None else act(linear(x, gate_weight, gate_bias)) * hidden
    return linear(hidden.float(), out_weight, out_bias)


def int8(experts):
    return experts._replace(
        **{n: None if (w := getattr(experts, n)) is None else ck.pack_weight(w, "int8") for n in MATRICES}
    )


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
def test_a_linear_layer_is_exact_for_its_integers(dtype, rows):
    x, weight, bias = randn(rows, 131, dtype=dtype, seed=1), randn(1, 70, 131, dtype=dtype), randn(1, 70, dtype=dtype)
    y = ck.grouped_linear(x, ck.pack_weight(weight, "int8"), bias, torch.tensor([0, rows], dtype=torch.int32))
    expected = fake_quantized(x) @ fake_quantized(weight[0]).T + bias[0].double()
    assert (y.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-35, 1e37])
def test_rows_of_any_size_are_scaled(size):
    x, weight, bias = randn(6, 40, seed=1) * size, randn(1, 33, 40) / 40, randn(1, 33)
    y = ck.grouped_linear(x, ck.pack_weight(weight, "int8"), bias, torch.tensor([0, 6], dtype=torch.int32))
    expected = x.double() @ weight[0].double().T + bias.double()
    assert y.isfinite().all()
    assert (y.double() - expected).abs().max() <= 2e-2 * expected.abs().max()


CALL = """
import pickle, sys, torch, clipup_kernels as ck
x, weight, bias = pickle.load(sys.stdin.buffer)
y = ck.grouped_linear(x, ck.pack_weight(weight, "int8"), bias, torch.tensor([0, len(x)], dtype=torch.int32))
pickle.dump((y, ck.pack_weight(weight, "int8")), sys.stdout.buffer)
"""


def on_tier(tier, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", CALL], input=pickle.dumps(arguments), env=os.environ | {"CLIPUP_CPU_ISA": tier},
        capture_output=True, check=True,
    )  # fmt: skip
    return pickle.loads(done.stdout)


@pytest.mark.slow
def test_tiers_agree_and_read_each_others_weights():
    refused = subprocess.run(
        [sys.executable, "-c", "import clipup_kernels; clipup_kernels.backend_info()"], capture_output=True, text=True,
        env=os.environ | {"CLIPUP_CPU_ISA": "none"}, check=False,
    )  # fmt: skip
    tiers = refused.stderr.split("one that this CPU has (")[1].split(")")[0].split(", ")
    assert "portable" in tiers
    x, weight, bias = randn(30, 70, seed=1), randn(1, 45, 70), randn(1, 45)
    offsets = torch.tensor([0, 30], dtype=torch.int32)
    packed = ck.pack_weight(weight, "int8")
    here = ck.grouped_linear(x, packed, bias, offsets)
    for tier in tiers:
        there, foreign = on_tier(tier, x, weight, bias)
        assert (there - here).abs().max() <= (1e-6 if tier != "portable" else 1e-2) * here.abs().max(), tier
        again = ck.pack_weight(foreign)
        assert torch.equal(ck.unpack_weight(foreign), ck.unpack_weight(packed)), tier
        assert again.layout == packed.layout and torch.equal(again.block, packed.block), tier
        if foreign.layout != packed.layout:
            with pytest.raises(
                ValueError, match=r"packed as int8x4x.*pack the weight again here: pack_weight\(packed\)"
            ):
                ck.grouped_linear(x, foreign, bias, offsets)


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_activations_are_within_1e_4(activation):
    """One input and one hidden unit: both are the largest of their row, so that quantization changes nothing."""
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e4, 1e4, -90.0, 88.0])])[:, None]
    one = torch.ones(1, 1)
    y = ck.dense_mlp(z, ck.pack_weight(one, "int8"), None, ck.pack_weight(one, "int8"), None, activation)
    exact = ck.dense_mlp(z.double(), one.double(), None, one.double(), None, activation)
    assert ((y.double() - exact).abs() <= 1.5e-4 * exact.abs().clamp(min=1)).all()


def test_an_input_scale_balances_inputs_and_weights():
    x, weight = randn(20, 64, seed=1), randn(1, 48, 64)
    x[:, :2] *= 100
    weight[..., :2] /= 100
    offsets = torch.tensor([0, 20], dtype=torch.int32)
    exact = x.double() @ weight[0].double().T
    scale = torch.ones(64)
    scale[:2] = 0.01
    plain, balanced = ck.pack_weight(weight, "int8"), ck.pack_weight(weight, "int8", scale)
    errors = [relative_error(ck.grouped_linear(x, packed, None, offsets), exact) for packed in (plain, balanced)]
    assert errors[0] > 10 * errors[1] and errors[1] < 2e-2
    assert (ck.unpack_weight(balanced) - weight).abs().max() <= weight.abs().max() / 127


@pytest.mark.parametrize("case", covering(dtype=DTYPES, activation=("gelu", "silu"), gated=(False, True)))
def test_an_mlp_follows_the_oracle(case):
    dtype, activation, gated = case.values()
    experts = make_experts(SHAPES["odd"], dtype, activation, True, gated, 2)._asdict()
    weights = {name: w[0] for name, w in experts.items() if isinstance(w, torch.Tensor)}
    x = randn(29, SHAPES["odd"].width, dtype=dtype, seed=3)
    packed = {n: ck.pack_weight(w, "int8") if n in MATRICES else w for n, w in weights.items()}
    found = ck.dense_mlp(x, **packed, activation=activation)
    # The hidden activations are rounded to x's type before they are quantized, which moves a few to the next step.
    assert relative_error(found, oracle(x, **weights, activation=activation)) <= 8e-3


@pytest.mark.parametrize("case", covering(shape=[n for n in SHAPES if SHAPES[n].tokens], gated=(False, True)))
def test_experts_are_close_to_those_with_plain_weights(case):
    shape = SHAPES[case["shape"]]
    gates, plan = route(shape)
    x, experts = randn(shape.tokens, shape.width, seed=1), make_experts(shape, gated=case["gated"], seed=2)
    found = ck.expert_mlp(x, gates, plan, *int8(experts))
    assert relative_error(found, ck.expert_mlp(x, gates, plan, *experts).double()) <= 3e-2


def test_a_row_does_not_depend_on_the_others():
    x, weight = randn(200, 64, seed=1), ck.pack_weight(randn(1, 96, 64), "int8")
    whole = ck.grouped_linear(x, weight, None, torch.tensor([0, 200], dtype=torch.int32))
    alone = [ck.grouped_linear(row[None], weight, None, torch.tensor([0, 1], dtype=torch.int32)) for row in x]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_gives_nan_in_its_row_and_channel_alone(value):
    x, weight, bias = randn(20, 40, seed=1), randn(1, 33, 40), randn(1, 33)
    offsets = torch.tensor([0, 20], dtype=torch.int32)
    clean = ck.grouped_linear(x, ck.pack_weight(weight, "int8"), bias, offsets)
    x[7, 39] = value
    weight[0, 5, 3] = torch.nan
    y = ck.grouped_linear(x, ck.pack_weight(weight, "int8"), bias, offsets)
    rows, channels = torch.arange(20) != 7, torch.arange(33) != 5
    assert y[7].isnan().all() and y[:, 5].isnan().all()
    assert torch.equal(y[rows][:, channels], clean[rows][:, channels])


def test_wrong_calls_are_refused_by_name():
    weight = randn(2, 33, 40)
    for named, call in {
        "got 'int4'": lambda: ck.pack_weight(weight, "int4"),
        "float64": lambda: ck.pack_weight(weight.double(), "int8"),
        "quantize must be None": lambda: ck.pack_weight(ck.pack_weight(weight), "int8"),
        "at most 65536": lambda: ck.pack_weight(torch.zeros(1, 1, 65537), "int8"),
        "input_scale was given": lambda: ck.pack_weight(weight, input_scale=torch.ones(40)),
        "input_scale must have": lambda: ck.pack_weight(weight, "int8", torch.ones(39)),
        "input_scale: expected": lambda: ck.pack_weight(weight, "int8", torch.full((40,), torch.nan)),
        "expected positive": lambda: ck.pack_weight(weight, "int8", torch.zeros(40)),
    }.items():
        with pytest.raises((TypeError, ValueError, RuntimeError), match=named):
            call()


def test_experts_of_other_layouts_or_scales_are_refused():
    shape = SHAPES["odd"]
    gates, plan = route(shape)
    x, plain = randn(shape.tokens, shape.width), make_experts(shape, gated=True)
    other = ck.pack_weight(plain.gate_weight, "int8", torch.full((shape.width,), 2.0))
    for change in ({"out_weight": ck.pack_weight(plain.out_weight)}, {"gate_weight": other}):
        with pytest.raises(ValueError, match="out_weight|packed_gate"):
            ck.expert_mlp(x, gates, plan, *int8(plain)._replace(**change))


def test_a_weight_that_is_too_short_or_has_gaps_is_refused_before_it_is_read():
    packed, offsets = ck.pack_weight(randn(1, 33, 40), "int8"), torch.tensor([0, 3], dtype=torch.int32)
    for block in (packed.block[:-4], torch.stack([packed.block] * 2, 1)[:, 0]):
        with pytest.raises(ValueError, match="takes .* bytes"):
            ck.grouped_linear(randn(3, 40), packed._replace(block=block), None, offsets)
