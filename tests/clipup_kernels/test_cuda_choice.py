"""Which implementation answers on CUDA tensors, as far as it can be told without a GPU."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from moe_cases import DTYPES

import clipup_kernels as ck
from clipup_kernels.backends import extension, select_cuda

ON_TRITON = {"router_logits", "topk_gating", "dispatch", "permute", "combine", "grouped_linear", "expert_mlp"}


def in_a_fresh_process(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != extension.FORCE_BACKEND}
    run = subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def fresh_choice(monkeypatch):
    """Forgets what earlier calls found out, and what these find out; nothing is chosen by the environment."""
    monkeypatch.delenv(extension.FORCE_BACKEND, raising=False)
    for function in (select_cuda.fallback_reason, select_cuda._runs_triton):
        function.cache_clear()
    yield
    for function in (select_cuda.fallback_reason, select_cuda._runs_triton):
        function.cache_clear()


def answering(monkeypatch, op: str, dtype: torch.dtype, runs_triton: bool = True) -> str:
    """Name of the module whose function of that name is called."""
    called = []
    modules = {
        kind: SimpleNamespace(**{op: lambda first, kind=kind: called.append(kind)}) for kind in ("triton", "torch")
    }
    monkeypatch.setattr(select_cuda, "_kernels", lambda name: modules["triton"])
    monkeypatch.setattr(select_cuda, "torch_eager", modules["torch"])
    monkeypatch.setattr(select_cuda, "_runs_triton", lambda device_index: runs_triton)
    select_cuda.kernel_of(op)(torch.empty(0, dtype=dtype))
    (kind,) = called
    return kind


@pytest.mark.parametrize("op", ["topk_gating", "permute", "combine_backward", "expert_mlp_forward"])
def test_triton_answers_what_it_computes_and_torch_answers_float64(monkeypatch, op):
    for dtype in DTYPES:
        assert answering(monkeypatch, op, dtype) == "triton"
    assert answering(monkeypatch, op, torch.float64) == "torch"
    assert answering(monkeypatch, op, torch.float32, runs_triton=False) == "torch"


@pytest.mark.parametrize("op", sorted(select_cuda._TRITON_FILE))
def test_every_op_finds_its_kernels(op):
    assert callable(getattr(select_cuda._kernels(op), op))


def test_importing_the_package_imports_no_triton_and_asks_for_no_gpu():
    code = (
        "import sys, torch, torch.utils.flop_counter\n"  # which imports Triton itself
        "before = {name for name in sys.modules if name.partition('.')[0] == 'triton'}\n"
        "def refuse(*args): raise AssertionError('a GPU was asked for')\n"
        "for name in ('is_available', 'device_count', 'get_device_capability', 'current_device', 'init'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import clipup_kernels as ck\n"
        "ck.backend_info()\n"
        "after = {name for name in sys.modules if 'triton' in name}\n"
        "assert not [name for name in after if name.startswith('clipup_kernels.triton')], after\n"
        "assert {name for name in after if name.partition('.')[0] == 'triton'} == before, after - before\n"
    )
    in_a_fresh_process(code)


def test_backend_info_names_triton_for_the_ops_that_have_kernels(fresh_choice):
    told = ck.backend_info()
    assert told["cuda_fallback_reason"] is None
    assert {name for name, implementation in told["cuda"].items() if implementation == "triton"} == ON_TRITON


def test_triton_can_be_left_out_and_the_reason_is_told():
    code = "import clipup_kernels as ck; i = ck.backend_info(); print(*i['cuda'].values(), i['cuda_fallback_reason'])"
    out = in_a_fresh_process(code, CLIPUP_BACKEND="reference")
    assert "triton" not in out and out.strip().endswith("CLIPUP_BACKEND=reference is set")


def test_a_missing_triton_is_told_with_its_mend():
    code = (
        "import sys, clipup_kernels as ck; sys.modules['triton'] = None\n"
        "i = ck.backend_info(); print(set(i['cuda'].values()), i['cuda_fallback_reason'])"
    )
    out = in_a_fresh_process(code)
    assert out.startswith("{'torch'}") and 'pip install "triton"' in out


def test_a_gpu_that_triton_does_not_know_runs_torch_after_one_warning(monkeypatch, fresh_choice):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"plain torch on cuda:3.*compute capability 7\.5.*8\.0"):
        assert not select_cuda._runs_triton(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not select_cuda._runs_triton(3)


def test_nobody_is_warned_of_what_they_asked_for(monkeypatch, fresh_choice):
    monkeypatch.setenv(extension.FORCE_BACKEND, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not select_cuda._runs_triton(0)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_triton_runs_from_compute_capability_8_0_on(monkeypatch, fresh_choice, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert select_cuda._runs_triton(0)
