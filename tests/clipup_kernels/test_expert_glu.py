"""expert_glu: experts whose first two matrices are one weight compute exactly what expert_mlp does with its halves."""

import pytest
import torch
from moe_cases import DTYPES, ROUTINGS, SHAPES, TOLERANCE, make_experts, randn, route

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "routing"),
    [(shape, "capacity") for shape in SHAPES.values()] + [(SHAPES["odd"], routing) for routing in ROUTINGS],
    ids=str,
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_output_and_gradients_are_bitwise_those_of_expert_mlp(shape, routing, dtype, recompute):
    gate_in, out_weight, in_weight, gate_weight = halves(shape, dtype)
    results = []
    for glu in (True, False):
        x, gates, plan = inputs(shape, routing, dtype)
        out = out_weight.detach().clone().requires_grad_()
        if glu:
            y = ck.expert_glu(x, gates, plan, gate_in, out, "silu", recompute)
        else:
            y = ck.expert_mlp(x, gates, plan, in_weight, None, out, None, "silu", gate_weight, recompute=recompute)
        y.backward(randn(*y.shape, dtype=dtype, seed=5))
        first = gate_in.grad if glu else torch.cat((gate_weight.grad, in_weight.grad), dim=1)
        results.append((y, x.grad, gates.grad, first, out.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_every_activation_follows_the_reference(activation):
    shape = SHAPES["plain"]
    gate_in, out_weight, *_ = halves(shape, torch.float32, activation)
    x, gates, plan = inputs(shape, "dropless", torch.float32)
    y = ck.expert_glu(x, gates, plan, gate_in, out_weight, activation)
    expected = ck.reference.expert_glu(x.double(), gates, plan, gate_in.double(), out_weight.double(), activation)
    assert (y - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


def test_the_gradient_of_both_halves_is_one_contiguous_tensor():
    shape = SHAPES["plain"]
    gate_in, out_weight, *_ = halves(shape, torch.float32)
    x, gates, plan = inputs(shape, "dropless", torch.float32)
    ck.expert_glu(x, gates, plan, gate_in, out_weight).sum().backward()
    assert gate_in.grad.is_contiguous()


def test_halves_that_expert_mlp_gets_as_views_give_the_same():
    shape = SHAPES["odd"]
    gate_in, out_weight, *_ = halves(shape, torch.float32)
    x, gates, plan = inputs(shape, "capacity", torch.float32)
    gate_weight, in_weight = gate_in.chunk(2, dim=1)
    for first, second in ((gate_weight, in_weight), (in_weight, gate_weight)):
        views = ck.expert_mlp(x, gates, plan, second, None, out_weight, None, "silu", first)
        copies = ck.expert_mlp(x, gates, plan, second.contiguous(), None, out_weight, None, "silu", first.contiguous())
        assert torch.equal(views, copies)


@pytest.mark.parametrize("frozen", ["x", "gates", "gate_in", "out"])
def test_only_the_wanted_gradients_are_computed(frozen):
    shape = SHAPES["plain"]
    gate_in, out_weight, *_ = halves(shape, torch.float32)
    x, gates, plan = inputs(shape, "dropless", torch.float32)
    arguments = {"x": x, "gates": gates, "gate_in": gate_in, "out": out_weight}
    ck.expert_glu(x, gates, plan, gate_in, out_weight).sum().backward()
    expected = {name: one.grad for name, one in arguments.items()}
    fresh = {name: one.detach().requires_grad_(name != frozen) for name, one in arguments.items()}
    ck.expert_glu(fresh["x"], fresh["gates"], plan, fresh["gate_in"], fresh["out"]).sum().backward()
    for name, one in fresh.items():
        assert (one.grad is None) == (name == frozen) and (name == frozen or torch.equal(one.grad, expected[name]))


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


def test_second_derivatives_are_refused_by_name():
    shape = SHAPES["plain"]
    gate_in, out_weight, *_ = halves(shape, torch.float32)
    x, gates, plan = inputs(shape, "dropless", torch.float32)
    (grad,) = torch.autograd.grad(ck.expert_glu(x, gates, plan, gate_in, out_weight).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="clipup::expert_glu_backward has no derivative"):
        grad.sum().backward()
