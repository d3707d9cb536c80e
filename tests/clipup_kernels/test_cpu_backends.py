"""Every CPU backend follows the oracle, and the instruction tier can be forced."""

import os
import subprocess
import sys

import pytest
import torch
from moe_cases import DTYPES, SHAPES, assert_follows, covering, double, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels.backends import extension, registry

compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")


def with_gradients(op, leaves, *rest):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = op(*leaves[:2], *rest, *leaves[2:])
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]


@compiled
@pytest.mark.parametrize(
    "case", covering(backend=("cpp", "torch_matmul", "torch_eager"), dtype=DTYPES, gated=(False, True))
)
def test_products_follow_the_oracle_on_every_backend(force_backend, case):
    backend, dtype, gated = case.values()
    force_backend(backend)
    assert registry.choose("expert_mlp_forward", dtype, "cpu").backend.name == backend
    shape = SHAPES["odd"]
    gates, plan = route(shape, "capacity")
    x, experts = randn(shape.tokens, shape.width, dtype=dtype, seed=1), make_experts(shape, dtype, gated=gated)
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=2)
    weights = {name: weight for name, weight in experts._asdict().items() if isinstance(weight, torch.Tensor)}

    def results(package, convert):
        def mlp(x, gates, *tensors):
            return package.expert_mlp(x, gates, plan, **dict(zip(weights, tensors, strict=True)))

        def linear(rows, weight, bias):
            return package.grouped_linear(rows, weight, bias, plan.offsets)

        arguments = [convert(tensor) for tensor in (x, gates, *weights.values())]
        one = [convert(tensor) for tensor in (rows, experts.in_weight, experts.in_bias)]
        return with_gradients(mlp, arguments) + with_gradients(linear, one)

    for index, (value, want) in enumerate(zip(results(ck, lambda t: t), results(ck.reference, double), strict=True)):
        assert_follows(value, want, dtype, f"result {index}")


@compiled
@pytest.mark.parametrize("tier", ["portable", "sse9"])
def test_the_instruction_tier_can_be_forced_and_an_unknown_one_is_refused(tier):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLIPUP_")}
    code = "import clipup_kernels as ck; print(ck.backend_info()['instructions'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=kept | {"CLIPUP_CPU_ISA": tier}, capture_output=True, text=True
    )
    if tier == "portable":
        assert run.stdout.strip() == "portable"
    else:
        assert run.returncode != 0 and "CLIPUP_CPU_ISA" in run.stderr and "sse9" in run.stderr


@compiled
def test_results_do_not_depend_on_the_number_of_threads(force_backend):
    force_backend("cpp")
    shape = SHAPES["plain"]._replace(tokens=301)
    gates, plan = route(shape)
    leaves = [randn(shape.tokens, shape.width, seed=1), gates, *make_experts(shape)[:4]]
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(ck.expert_mlp, leaves, plan))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
