"""dense_mlp: one MLP for all tokens, on the expert kernels."""

import pytest
import torch
from moe_cases import DTYPES, assert_follows, double, randn
from torch.utils.flop_counter import FlopCounterMode

import clipup_kernels as ck


def arguments(tokens=37, width=19, hidden=53, dtype=torch.float32, bias=True, gated=False):
    def draw(*size, wanted=True):
        draw.seed += 1
        return randn(*size, dtype=dtype, seed=draw.seed) * 0.3 if wanted else None

    draw.seed = 0
    return {
        "x": draw(tokens, width),
        "in_weight": draw(hidden, width),
        "in_bias": draw(hidden, wanted=bias),
        "out_weight": draw(width, hidden),
        "out_bias": draw(width, wanted=bias),
        "gate_weight": draw(hidden, width, wanted=gated),
        "gate_bias": draw(hidden, wanted=gated and bias),
    }


def oracle(activation, x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias):
    linear = torch.nn.functional.linear
    x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias = (
        None if t is None else double(t)
        for t in (x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)
    )  # fmt: skip
    z = linear(x, in_weight, in_bias)
    if gate_weight is None:
        a = ck.reference.activate(z, activation)
    else:
        a = ck.reference.activate(linear(x, gate_weight, gate_bias), activation) * z
    return linear(a, out_weight, out_bias)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_follows_the_oracle(dtype, activation, bias, gated):
    case = arguments(dtype=dtype, bias=bias, gated=gated)
    first, *again = (ck.dense_mlp(**case, activation=activation) for _ in range(3))  # packed from the second one on
    assert_follows(first, oracle(activation, **case), dtype, "y")
    assert all(torch.equal(first, y) for y in again)


@pytest.mark.parametrize("tokens", [0, 1, 3000])
def test_any_number_of_tokens(tokens):
    case = arguments(tokens=tokens)
    assert_follows(ck.dense_mlp(**case), oracle("gelu", **case), torch.float32, "y")


def test_its_flops_are_counted():
    case = [*arguments().values(), "gelu"]
    with FlopCounterMode(display=False) as counter:
        torch.ops.clipup.dense_mlp(*case)
    assert counter.get_total_flops() == 2 * 2 * 37 * 19 * 53


def test_it_refuses_to_be_differentiated():
    case = arguments()
    case["in_weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match="dense_mlp.*inference"):
        ck.dense_mlp(**case).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_weight": torch.zeros(53, 20)}, r"in_weight.*\[H, 19\].*\[53, 20\]"),
        ({"out_weight": torch.zeros(20, 53)}, r"out_weight.*\[19, 53\].*\[20, 53\]"),
        ({"out_bias": torch.zeros(3)}, "out_bias"),
        ({"gate_bias": torch.zeros(53)}, "gate_bias.*gate_weight"),
        ({"activation": "selu"}, "activation.*selu"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ck.dense_mlp(**(arguments() | change))


def test_a_mix_of_types_is_refused():
    case = arguments()
    with pytest.raises(TypeError, match="in_weight"):
        ck.dense_mlp(**(case | {"in_weight": case["in_weight"].double()}))
