"""The self-check on Triton's kernels, interpreted: right ones pass, and a broken one is replaced by plain torch."""

import pytest
import torch
from moe_cases import Shape, assert_follows, double, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels.backends import registry
from clipup_kernels.self_check import self_check
from clipup_kernels.triton import rows

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch):
    """The table of a CUDA device, for CPU tensors."""
    triton, torch_eager = registry.by_name("triton"), registry.by_name("torch_eager")
    monkeypatch.setattr(registry, "BACKENDS", (triton._replace(device="cpu"), torch_eager))
    registry.trust_all()
    yield
    monkeypatch.undo()
    registry.trust_all()


@pytest.mark.slow
def test_every_kernel_passes():
    findings = self_check("cpu", [torch.float32])
    assert {finding.op for finding in findings} == set(registry.by_name("triton").modules)
    assert [finding for finding in findings if finding.reason is not None] == []


@pytest.mark.slow
def test_a_broken_kernel_is_named_and_plain_torch_takes_its_place(monkeypatch):
    launch = rows._weighted_sum
    monkeypatch.setattr(rows, "_weighted_sum", lambda summed, gates, row: launch(summed, gates, row.roll(1, 0)))
    shape = Shape(37, 19, 53, 5, 3)
    gates, plan = route(shape)
    x, experts = randn(37, 19, seed=1), make_experts(shape)
    oracle = ck.reference.expert_mlp(double(x), double(gates), plan, *double(experts))

    findings = self_check("cpu", [torch.float32])

    failed = {finding.op: finding for finding in findings if finding.reason is not None}
    assert {"combine", "gather_sum"} <= set(failed) and failed["combine"].backend == "triton"
    assert "of the largest entry, allowed" in failed["combine"].reason
    assert all(registry.choose(op, torch.float32, "cpu").backend.name == "torch_eager" for op in failed)
    assert_follows(ck.expert_mlp(x, gates, plan, *experts), oracle, torch.float32)
