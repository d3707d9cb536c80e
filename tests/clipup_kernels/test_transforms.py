"""The ops under torch.func and forward-mode AD: reverse mode is right at every level, forward mode is an error."""

import pytest
import torch
from moe_cases import experts_case, gating_case, router_case, rows_cases
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, linearize, vjp, vmap

import clipup_kernels as ck

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs the ops sample by sample
CASES = [router_case("odd"), gating_case(37, 5, 3), *rows_cases("odd", "dropless"), experts_case("odd", "dropless")]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)


def parts(case, package=ck):
    """A function of the op's floating tensors, and these."""
    names = [n for n, v in case.arguments.items() if torch.is_tensor(v) and v.is_floating_point()]

    def function(*tensors):
        out = getattr(package, case.op)(**(case.arguments | dict(zip(names, tensors, strict=True))))
        return out if torch.is_tensor(out) else out.gates

    return function, tuple(case.arguments[name] for name in names)


def scalar(function):
    return lambda *tensors: function(*tensors).square().sum()


@EACH
def test_gradients_by_torch_func_are_those_of_plain_torch(case):
    ours, tensors = parts(case)
    reference, _ = parts(case, ck.reference)
    wanted = tuple(range(len(tensors)))
    found = grad(scalar(ours), wanted)(*tensors)
    torch.testing.assert_close(found, grad(scalar(reference), wanted)(*tensors), rtol=1e-4, atol=1e-4)
    value, pull_back = vjp(ours, *tensors)
    torch.testing.assert_close(pull_back(2 * value), found)


@EACH
def test_gradients_by_sample_are_those_of_the_samples(case):
    ours, (first, *others) = parts(case)
    batch, one = torch.stack([first, -first, 2 * first]), grad(scalar(ours))
    found = vmap(one, in_dims=(0, *[None] * len(others)))(batch, *others)
    torch.testing.assert_close(found, torch.stack([one(sample, *others) for sample in batch]))


@EACH
def test_forward_mode_is_refused_by_name_whichever_argument_has_a_tangent(case):
    ours, tensors = parts(case)
    refusal = rf"clipup::{case.op}\w* has no forward-mode derivative"
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


@EACH
@pytest.mark.parametrize("second", [lambda run: grad(lambda *t: grad(run)(*t).square().sum()), hessian])
def test_second_derivatives_by_torch_func_are_refused_by_name(case, second):
    ours, tensors = parts(case)
    with pytest.raises(NotImplementedError, match=rf"clipup::({case.op}\w*|gather_sum) has no"):
        second(scalar(ours))(*tensors)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.op)
def test_gradients_by_torch_func_compile_without_graph_breaks(case):
    ours, tensors = parts(case)
    compiled = torch.compile(lambda *t: grad(scalar(ours))(*t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), grad(scalar(ours))(*tensors))
