"""expert_glu: experts whose first two matrices are one weight compute exactly what expert_mlp does with its halves."""

import pytest
import torch
from moe_cases import DTYPES, ROUTINGS, SHAPES, TOLERANCE, covering, make_experts, randn, route

import clipup_kernels as ck


def halves(shape, dtype, activation="silu"):
    """The two weights of experts, and the first one's halves as weights of their own."""
    experts = make_experts(shape, dtype, activation, bias=False, gated=True)
    gate_in = torch.cat((experts.gate_weight, experts.in_weight), dim=1).requires_grad_()
    parts = [experts.in_weight.clone().requires_grad_(), experts.gate_weight.clone().requires_grad_()]
    return gate_in, experts.out_weight.clone().requires_grad_(), *parts


def inputs(shape, routing, dtype):
    gates, plan = route(shape, routing)
    return randn(shape.tokens, shape.width, dtype=dtype).requires_grad_(), gates.requires_grad_(), plan


@pytest.mark.parametrize(
    "case",
    covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES) + covering(frozen=range(4), recompute=("none", "full")),
)
def test_output_and_gradients_are_bitwise_those_of_expert_mlp(case):
    case = {"shape": "odd", "routing": "capacity", "dtype": torch.float32, "recompute": "none", "frozen": None} | case
    shape, dtype, recompute = SHAPES[case["shape"]], case["dtype"], case["recompute"]
    results = []
    for glu in (True, False):
        gate_in, out, in_weight, gate_weight = halves(shape, dtype)
        x, gates, plan = inputs(shape, case["routing"], dtype)
        if case["frozen"] is not None:  # one argument alone has no gradient
            (x, gates, gate_in, out)[case["frozen"]].requires_grad_(False)
        if glu:
            y = ck.expert_glu(x, gates, plan, gate_in, out, "silu", recompute)
        else:
            y = ck.expert_mlp(x, gates, plan, in_weight, None, out, None, "silu", gate_weight, recompute=recompute)
        y.backward(randn(*y.shape, dtype=dtype, seed=5))
        first = gate_in.grad if glu else torch.cat((gate_weight.grad, in_weight.grad), dim=1)
        if case["frozen"] == 2:
            assert not glu or first is None
            first = y
        results.append((y, x.grad, gates.grad, first, out.grad))
    for one, other in zip(*results, strict=True):
        assert one is None is other or torch.equal(one, other)


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_every_activation_follows_the_reference(activation):
    shape = SHAPES["plain"]
    gate_in, out_weight, *_ = halves(shape, torch.float32, activation)
    x, gates, plan = inputs(shape, "dropless", torch.float32)
    y = ck.expert_glu(x, gates, plan, gate_in, out_weight, activation)
    expected = ck.reference.expert_glu(x.double(), gates, plan, gate_in.double(), out_weight.double(), activation)
    assert (y - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


def test_halves_that_expert_mlp_gets_as_views_give_the_same():
    shape = SHAPES["odd"]
    gate_in, out_weight, *_ = halves(shape, torch.float32)
    x, gates, plan = inputs(shape, "capacity", torch.float32)
    gate_weight, in_weight = gate_in.chunk(2, dim=1)
    for first, second in ((gate_weight, in_weight), (in_weight, gate_weight)):
        views = ck.expert_mlp(x, gates, plan, second, None, out_weight, None, "silu", first)
        copies = ck.expert_mlp(x, gates, plan, second.contiguous(), None, out_weight, None, "silu", first.contiguous())
        assert torch.equal(views, copies)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_in_weight": torch.zeros(8, 127, 32)}, r"gate_in_weight must have shape \[8, 128, 32\]"),
        ({"out_weight": torch.zeros(8, 31, 64)}, "out_weight must have shape"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"recompute": "half"}, "recompute must be"),
        ({"gates": torch.zeros(96, 3)}, "gates must have shape"),
        ({"x": torch.zeros(96, 32, dtype=torch.float64)}, "float64"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    shape = SHAPES["plain"]
    gate_in, out_weight, *_ = halves(shape, torch.float32)
    x, gates, plan = inputs(shape, "dropless", torch.float32)
    arguments = {"x": x, "gates": gates, "plan": plan, "gate_in_weight": gate_in, "out_weight": out_weight}
    with pytest.raises((TypeError, ValueError), match=message):
        ck.expert_glu(**{**arguments, **change})
