"""Which backend computes an op, on which device and in which type, without a GPU."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from moe_cases import DTYPES

import clipup_kernels as ck
from clipup_kernels.backends import extension, registry

compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")

ON_TRITON = {"router_logits", "topk_gating", "dispatch", "permute", "combine", "grouped_linear", "expert_mlp"} | {
    "expert_glu"
}
ALL_OPS = (*registry.ROUTING, *registry.ROWS, *registry.PRODUCTS)


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CLIPUP_")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)


def output_of(code: str, **environment: str) -> str:
    run = in_a_fresh_process(code, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def chosen(op: str, dtype: torch.dtype, device: str, index: int | None = None) -> str:
    return registry.choose(op, dtype, device, index).backend.name


@pytest.fixture
def modern_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@pytest.mark.parametrize("backend", registry.BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_has_a_function_for_every_op_of_its_entry(backend):
    for op in backend.modules:
        module = __import__(f"clipup_kernels.{backend.modules[op]}", fromlist=[op])
        assert callable(getattr(module, op)), op


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_float64_runs_in_plain_torch(force_backend, op, device):
    assert chosen(op, torch.float64, device) == "torch_eager"


@compiled
@pytest.mark.parametrize("op", (*registry.ROUTING, *registry.ROWS))
def test_cpp_computes_routing_and_rows_on_the_cpu(force_backend, op):
    assert all(chosen(op, dtype, "cpu") == "cpp" for dtype in (*DTYPES, torch.int32))


@compiled
@pytest.mark.parametrize(
    ("tier", "tiles", "forced", "expected"),
    [
        ("avx512_bf16", False, {}, set()),
        ("avx512_bf16", True, {}, {torch.bfloat16}),
        ("portable", False, {}, set(DTYPES)),
        ("portable", True, {"CLIPUP_CPU_ISA": "portable"}, set()),
        ("avx2", False, {"CLIPUP_BACKEND": "torch_matmul"}, set(DTYPES)),
        ("portable", True, {"CLIPUP_BACKEND": "cpp"}, set()),
    ],
)
def test_matmul_computes_the_products_that_the_kernels_are_slower_at(
    force_backend, monkeypatch, tier, tiles, forced, expected
):
    monkeypatch.delenv("CLIPUP_CPU_ISA", raising=False)
    for name, value in forced.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        extension, "NATIVE", SimpleNamespace(instruction_tier=lambda: tier, has_matrix_tiles=lambda: tiles)
    )
    for op in registry.PRODUCTS:
        assert {dtype for dtype in DTYPES if chosen(op, dtype, "cpu") == "torch_matmul"} == expected
        assert {chosen(op, dtype, "cpu") for dtype in set(DTYPES) - expected} <= {"cpp"}
    assert chosen("dispatch", torch.int32, "cpu") == "cpp"


@pytest.mark.parametrize("op", sorted(registry.by_name("triton").modules))
def test_triton_computes_its_ops_on_cuda(force_backend, modern_gpu, op):
    assert all(chosen(op, dtype, "cuda", 0) == "triton" for dtype in (*DTYPES, torch.int32))


def test_a_dense_mlp_is_torchs_own_on_cuda(force_backend, modern_gpu):
    assert chosen("dense_mlp", torch.bfloat16, "cuda", 0) == "torch_eager"


@compiled
def test_an_op_runs_the_function_of_the_chosen_backend(force_backend, modern_gpu):
    for name in ("torch_eager", "torch_matmul"):
        force_backend(name)
        function = registry.function_of("grouped_linear", torch.float32, "cpu")
        assert function.__module__ == f"clipup_kernels.backends.{name}"


@pytest.mark.parametrize("op", ALL_OPS)
def test_torch_eager_can_be_forced_for_every_op(force_backend, modern_gpu, op):
    force_backend("torch_eager")
    for device in ("cpu", "cuda"):
        choice = registry.choose(op, torch.float32, device, 0)
        assert choice.backend.name == "torch_eager" and choice.reason == "CLIPUP_BACKEND=torch_eager is set"


def test_a_forced_backend_leaves_the_ops_that_it_lacks_to_the_others(force_backend, modern_gpu):
    force_backend("triton")
    assert chosen("dense_mlp", torch.float32, "cuda", 0) == "torch_eager"
    force_backend("torch_matmul")
    assert chosen("expert_mlp_forward", torch.float32, "cuda", 0) == "triton"


def test_cuda_cpp_computes_gating_and_dispatch_only_when_it_is_forced(force_backend, modern_gpu, monkeypatch):
    monkeypatch.setattr(extension, "NATIVE", SimpleNamespace(build_info=lambda: {"cuda": True}))
    assert chosen("topk_gating", torch.float32, "cuda", 0) == "triton"
    force_backend("cpp_cuda")
    assert chosen("topk_gating", torch.float32, "cuda", 0) == chosen("dispatch", torch.int32, "cuda", 0) == "cpp_cuda"
    assert chosen("expert_mlp_forward", torch.float32, "cuda", 0) == "triton"


def test_a_forced_backend_that_cannot_run_is_refused_with_the_reason(force_backend, monkeypatch):
    monkeypatch.setattr(extension, "NATIVE", None)
    monkeypatch.setattr(extension, "FALLBACK_REASON", "no compiler")
    force_backend("cpp")
    with pytest.raises(
        RuntimeError, match=r"CLIPUP_BACKEND=cpp is set, but there is no compiled extension \(no compiler"
    ):
        ck.topk_gating(torch.zeros(2, 3), 1, True)


@pytest.mark.parametrize("name", ["reference", "matmul", "C++"])
def test_an_unknown_backend_is_refused_by_name_at_import(name):
    run = in_a_fresh_process("import clipup_kernels", CLIPUP_BACKEND=name)
    assert run.returncode != 0 and "CLIPUP_BACKEND must be one of torch_matmul, cpp, triton, cpp_cuda" in run.stderr
    assert repr(name) in run.stderr


def test_an_op_without_a_backend_is_refused_with_the_reasons(force_backend, monkeypatch):
    monkeypatch.setattr(extension, "NATIVE", None)
    with pytest.raises(RuntimeError, match="no backend computes packed_dense_mlp .* there is no compiled extension"):
        registry.choose("packed_dense_mlp", torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="it has no kernel there"):
        registry.choose("packed_dense_mlp", torch.float32, "cuda")


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
    output_of(code)


def test_backend_info_names_triton_for_the_ops_that_have_kernels(force_backend):
    info = ck.backend_info()
    assert info["cuda_fallback_reason"] is None and info["backends"]["triton"] == "Triton is installed"
    assert {op for op, by_type in info["cuda"].items() if by_type["bfloat16"] == "triton"} == ON_TRITON


def test_backend_info_says_what_is_forced():
    code = "import json, clipup_kernels as ck; i = ck.backend_info(); print(i['cuda'], i['cuda_fallback_reason'])"
    out = output_of(code, CLIPUP_BACKEND="torch_eager")
    assert "triton" not in out and out.strip().endswith("CLIPUP_BACKEND=torch_eager is set")


def test_backend_info_says_how_to_install_a_missing_triton():
    code = (
        "import sys, clipup_kernels as ck; sys.modules['triton'] = None\n"
        "i = ck.backend_info(); print(set(i['cuda']['expert_mlp'].values()), i['cuda_fallback_reason'])"
    )
    out = output_of(code)
    assert out.startswith("{'torch_eager'}") and 'pip install "triton"' in out


def test_a_gpu_that_triton_does_not_support_runs_torch_after_one_warning(force_backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"plain torch on cuda:3.*compute capability 7\.5.*8\.0"):
        function = registry.function_of("dispatch", torch.int32, "cuda", 3)
    assert function.__module__ == "clipup_kernels.backends.torch_eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.function_of("permute", torch.float32, "cuda", 3)


def test_a_forced_backend_gives_no_warning(force_backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    force_backend("torch_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.function_of("dispatch", torch.int32, "cuda", 0)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_triton_runs_from_compute_capability_8_0_on(force_backend, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert chosen("dispatch", torch.int32, "cuda", 0) == "triton"
