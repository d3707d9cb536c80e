"""The strong peers compute the layer: without a GPU in Triton's interpreter, and on QuACK's functions in torch."""

import sys
import types

import moe_bench
import peers
import pytest
import torch
import torch.nn.functional as F
from moe_layer import Case

pytestmark = pytest.mark.interpreter


def gemm(a, b, *, bias=None, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, tuned):  # noqa: N803
    assert A_idx is None or A_idx.dtype == torch.int32
    if cu_seqlens_k is not None:
        columns = a if A_idx is None else a[:, A_idx]
        bounds = zip(cu_seqlens_k, cu_seqlens_k[1:], strict=False)
        return torch.stack([columns[:, i:j] @ b[i:j] for i, j in bounds])
    rows = a if A_idx is None else a[A_idx]
    bounds = enumerate(zip(cu_seqlens_m, cu_seqlens_m[1:], strict=False))
    return torch.cat([rows[i:j] @ b[e] + (0 if bias is None else bias[e]) for e, (i, j) in bounds])


def gemm_act(a, b, *, activation, store_preact, **options):
    assert activation == "gelu_erf"
    z = gemm(a, b, **options)
    return z if store_preact else None, F.gelu(z)


def gemm_dact(a, b, z, *, activation, colvec_scale, colvec_reduce, **options):
    assert activation == "gelu_erf" and colvec_reduce and colvec_scale.dtype == torch.float32
    da, scale = gemm(a, b, **options), colvec_scale[:, None].to(z.dtype)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        activated = F.gelu(leaf)
    (dz,) = torch.autograd.grad(activated, leaf, scale * da)
    return dz, scale * activated.detach(), (activated.detach().float() * da.float()).sum(1)


@pytest.fixture
def quack(monkeypatch):
    interface = types.ModuleType("quack.gemm_interface")
    interface.gemm, interface.gemm_act, interface.gemm_dact = gemm, gemm_act, gemm_dact
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("impl", ["grouped_mm_fused", "quack"])
def test_strong_peers_follow_the_oracle(impl, dtype, training, quack):
    timed = peers.candidates([impl], Case(200, 16, 32, 3), 2, moe_bench.DTYPES[dtype], "cpu")
    assert moe_bench.check(timed, dtype, "cpu", training) == {}
