"""The self-check on Triton's kernels, interpreted: right ones pass, and a broken one is replaced by plain torch."""

import pytest
import torch

from clipup_kernels.backends import registry
from clipup_kernels.self_check import self_check
from clipup_kernels.triton import rows

pytestmark = pytest.mark.interpreter


@pytest.mark.slow
def test_every_kernel_passes_but_for_one_that_is_broken(monkeypatch):
    triton, torch_eager = registry.by_name("triton"), registry.by_name("torch_eager")
    monkeypatch.setattr(registry, "BACKENDS", (triton._replace(device="cpu"), torch_eager))
    launch = rows._weighted_sum
    try:
        findings = self_check("cpu", [torch.float32])
        assert {finding.op for finding in findings} == set(triton.modules)
        assert [finding for finding in findings if finding.reason is not None] == []
        monkeypatch.setattr(rows, "_weighted_sum", lambda summed, gates, row: launch(summed, gates, row.roll(1, 0)))
        failed = {finding.op: finding for finding in self_check("cpu", [torch.float32]) if finding.reason is not None}
        assert {"combine", "gather_sum"} <= set(failed) and failed["combine"].backend == "triton"
        assert all(registry.choose(op, torch.float32, "cpu").backend.name == "torch_eager" for op in failed)
    finally:
        registry.trust_all()
