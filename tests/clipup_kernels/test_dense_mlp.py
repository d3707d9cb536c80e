"""dense_mlp: one MLP for all tokens, on the expert kernels."""

import pytest
import torch
from moe_cases import DTYPES, assert_follows, covering, double, randn

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


@pytest.mark.parametrize(
    "case", covering(dtype=DTYPES, activation=ck.ACTIVATIONS, bias=(False, True), gated=(False, True))
)
def test_the_output_follows_the_oracle(case):
    case = dict(case)
    activation, tensors = case.pop("activation"), arguments(**case)
    assert_follows(ck.dense_mlp(**tensors, activation=activation), oracle(activation, **tensors), case["dtype"], "y")


@pytest.mark.parametrize("tokens", [0, 1, 3000])
def test_any_number_of_tokens(tokens):
    case = arguments(tokens=tokens)
    assert_follows(ck.dense_mlp(**case), oracle("gelu", **case), torch.float32, "y")


def test_it_refuses_to_be_differentiated():
    case = arguments()
    case["in_weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match="dense_mlp.*inference"):
        ck.dense_mlp(**case).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_weight": torch.zeros(53, 20)}, "in_weight"),
        ({"in_weight": torch.zeros(53, 19).double()}, "in_weight"),
        ({"out_weight": torch.zeros(20, 53)}, "out_weight"),
        ({"out_bias": torch.zeros(3)}, "out_bias"),
        ({"gate_bias": torch.zeros(53)}, "gate_bias.*gate_weight"),
        ({"activation": "selu"}, "activation.*selu"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ck.dense_mlp(**(arguments() | change))
