"""Every CPU backend follows the oracle, and the instruction tier can be forced."""

import os
import subprocess
import sys

import pytest
import torch
from moe_cases import DTYPES, SHAPES, assert_follows, double, make_experts, randn, route, with_grad

import clipup_kernels as ck
from clipup_kernels.backends import extension, registry

compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")


def expert_mlp_and_gradients(mlp, x, gates, plan, experts):
    leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    experts = with_grad(experts)
    y = mlp(*leaves, plan, *experts)
    leaves += [t for t in experts if isinstance(t, torch.Tensor)]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


@compiled
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpp", "torch_matmul", "torch_eager"])
def test_expert_mlp_follows_the_oracle_on_every_backend(force_backend, backend, dtype, gated):
    force_backend(backend)
    assert registry.choose("expert_mlp_forward", dtype, "cpu").backend.name == backend
    shape = SHAPES["odd"]
    gates, plan = route(shape, "capacity")
    x, experts = randn(shape.tokens, shape.width, dtype=dtype, seed=1), make_experts(shape, dtype, gated=gated)
    ours = expert_mlp_and_gradients(ck.expert_mlp, x, gates, plan, experts)
    oracle = expert_mlp_and_gradients(ck.reference.expert_mlp, double(x), double(gates), plan, double(experts))
    for index, (value, want) in enumerate(zip(ours, oracle, strict=True)):
        assert_follows(value, want, dtype, f"result {index}")


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpp", "torch_matmul", "torch_eager"])
def test_grouped_linear_follows_the_oracle_on_every_backend(force_backend, backend, dtype):
    force_backend(backend)
    shape = SHAPES["odd"]
    _, plan = route(shape, "capacity")
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=1)
    weight, bias = randn(shape.experts, shape.hidden, shape.width, dtype=dtype), randn(shape.experts, shape.hidden)

    def results(op, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = op(*leaves, plan.offsets)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    arguments = (rows, weight, bias.to(dtype))
    ours = results(ck.grouped_linear, *arguments)
    oracle = results(ck.reference.grouped_linear, *map(double, arguments))
    for index, (value, want) in enumerate(zip(ours, oracle, strict=True)):
        assert_follows(value, want, dtype, f"result {index}")


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CLIPUP_")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)


@compiled
def test_the_instruction_tier_can_be_forced():
    run = in_a_fresh_process(
        "import clipup_kernels as ck; print(ck.backend_info()['instructions'])", CLIPUP_CPU_ISA="portable"
    )
    assert run.stdout.strip() == "portable"


@compiled
def test_an_unknown_tier_is_refused_by_name():
    run = in_a_fresh_process("import clipup_kernels as ck; ck.backend_info()", CLIPUP_CPU_ISA="sse9")
    assert run.returncode != 0
    assert "CLIPUP_CPU_ISA" in run.stderr and "portable" in run.stderr and "sse9" in run.stderr


@compiled
def test_results_do_not_depend_on_the_number_of_threads(force_backend):
    force_backend("cpp")
    shape = SHAPES["plain"]._replace(tokens=301)
    gates, plan = route(shape)
    x, experts = randn(shape.tokens, shape.width, seed=1), make_experts(shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(expert_mlp_and_gradients(ck.expert_mlp, x, gates, plan, experts))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
