"""The ops under torch.func and forward-mode AD: reverse mode is right at every level, forward mode is an error."""

import warnings

import pytest
import torch
from moe_cases import SHAPES, make_experts, randn, route
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, linearize, vjp, vmap

import clipup_kernels as ck

SHAPE = SHAPES["odd"]


def cases():
    """Name of the op -> (a function of tensors that calls it, a plain torch function that equals it, the tensors)."""
    gates, plan = route(SHAPE, "capacity")
    x = randn(SHAPE.tokens, SHAPE.width, seed=3)
    rows = randn(SHAPE.tokens * SHAPE.k, SHAPE.width, seed=4)
    experts = make_experts(SHAPE)
    weight = randn(SHAPE.experts, SHAPE.width, seed=5)

    def of(package):
        return {
            "router_logits": lambda x, weight: package.router_logits(x, weight),
            "topk_gating": lambda logits: package.topk_gating(logits, SHAPE.k, True).gates,
            "permute": lambda x: package.permute(x, plan),
            "grouped_linear": lambda rows, weight: package.grouped_linear(rows, weight, None, plan.offsets),
            "combine": lambda rows, gates: package.combine(rows, gates, plan),
            "expert_mlp": lambda x, gates, *w: package.expert_mlp(x, gates, plan, *w, activation="gelu"),
        }

    tensors = {
        "router_logits": (x, weight),
        "topk_gating": (x @ weight.T,),
        "permute": (x,),
        "grouped_linear": (rows, experts.in_weight),
        "combine": (rows, gates),
        "expert_mlp": (x, gates, *experts[:4]),
    }
    ours, reference = of(ck), of(ck.reference)
    return {name: (ours[name], reference[name], tensors[name]) for name in ours}


NAMES = list(cases())


def scalar(function):
    return lambda *tensors: function(*tensors).square().sum()


@pytest.fixture(autouse=True)
def no_advice_about_loops():
    """vmap runs the ops sample by sample and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_torch_func_are_those_of_plain_torch(name):
    ours, reference, tensors = cases()[name]
    wanted = tuple(range(len(tensors)))
    found = grad(scalar(ours), wanted)(*tensors)
    for one, other in zip(found, grad(scalar(reference), wanted)(*tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    value, pull_back = vjp(ours, *tensors)
    for one, other in zip(pull_back(2 * value), found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_sample_are_those_of_the_samples(name):
    ours, _, tensors = cases()[name]
    batch = torch.stack([tensors[0], -tensors[0], 2 * tensors[0]])
    one = grad(scalar(ours))
    found = vmap(one, in_dims=(0, *[None] * (len(tensors) - 1)))(batch, *tensors[1:])
    torch.testing.assert_close(found, torch.stack([one(sample, *tensors[1:]) for sample in batch]))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused_by_name_whichever_argument_has_a_tangent(name):
    ours, _, tensors = cases()[name]
    refusal = rf"clipup::{name}\w* has no forward-mode derivative"
    for run in (
        lambda: linearize(ours, *tensors),
        lambda: jvp(lambda *t: grad(scalar(ours))(*t), tensors, tensors),
        lambda: jvp(lambda *t: vjp(ours, *t)[0], tensors, tensors),
    ):
        with pytest.raises(NotImplementedError, match=refusal):
            run()
    for place in range(len(tensors)):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refusal):
            arguments = [tensor.clone().requires_grad_() for tensor in tensors]
            arguments[place] = forward_ad.make_dual(arguments[place], tensors[place])
            ours(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_by_torch_func_are_refused_by_name(name):
    ours, _, tensors = cases()[name]
    refused = rf"{name}\w*|gather_sum"
    with pytest.raises(NotImplementedError, match=rf"clipup::({refused}) has no derivative: second derivatives"):
        grad(lambda *t: grad(scalar(ours))(*t).square().sum())(*tensors)
    with pytest.raises(NotImplementedError, match=rf"clipup::({refused}) has no (forward-mode )?derivative"):
        hessian(scalar(ours))(*tensors)


@pytest.mark.parametrize("name", ["router_logits", "expert_mlp"])
def test_gradients_by_torch_func_compile_without_graph_breaks(name):
    ours, _, tensors = cases()[name]
    compiled = torch.compile(lambda *t: grad(scalar(ours))(*t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), grad(scalar(ours))(*tensors))
