"""Which backend computes an op, on which device and in which type, without a GPU; and what ``backend_info`` says."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moe_cases import DTYPES

import clipup_kernels as ck
from clipup_kernels.backends import extension, registry
from clipup_kernels.machine import describe_machine, processor_name

compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")

CPU_FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
ALL_OPS = (*registry.ROUTING, *registry.ROWS, *registry.PRODUCTS)


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CLIPUP_")}
    code = "import sys, types\n" + code
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)


def chosen(op: str, dtype: torch.dtype, device: str, index: int | None = None) -> str:
    return registry.choose(op, dtype, device, index).backend.name


@pytest.fixture
def modern_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@compiled
@pytest.mark.parametrize(
    ("tier", "tiles", "openmp", "forced", "expected"),
    [
        ("avx512_bf16", False, True, {}, set()),
        ("avx512_bf16", True, True, {}, {torch.bfloat16}),
        ("avx512_bf16", False, False, {}, set(DTYPES)),
        ("portable", False, True, {}, set(DTYPES)),
        ("neon_dotprod", False, True, {}, set(DTYPES)),
        ("portable", True, False, {"CLIPUP_CPU_ISA": "portable"}, set()),
        ("avx2", False, True, {"CLIPUP_BACKEND": "torch_matmul"}, set(DTYPES)),
        ("portable", True, True, {"CLIPUP_BACKEND": "cpp"}, set()),
    ],
)
def test_matmul_computes_the_products_that_the_kernels_are_slower_at(
    force_backend, monkeypatch, tier, tiles, openmp, forced, expected
):
    monkeypatch.delenv("CLIPUP_CPU_ISA", raising=False)
    for name, value in forced.items():
        monkeypatch.setenv(name, value)
    native = SimpleNamespace(
        instruction_tier=lambda: tier, has_matrix_tiles=lambda: tiles, build_info=lambda: {"openmp": openmp}
    )
    monkeypatch.setattr(extension, "NATIVE", native)
    for op in registry.PRODUCTS:
        assert {dtype for dtype in DTYPES if chosen(op, dtype, "cpu") == "torch_matmul"} == expected
        assert {chosen(op, dtype, "cpu") for dtype in set(DTYPES) - expected} <= {"cpp"}
    assert chosen("dispatch", torch.int32, "cpu") == "cpp"


@compiled
def test_matmul_computes_gradients_in_bfloat16_where_the_kernels_have_tiles_in_the_forward_pass_only(
    force_backend, monkeypatch
):
    monkeypatch.delenv("CLIPUP_CPU_ISA", raising=False)
    native = SimpleNamespace(
        instruction_tier=lambda: "amx", has_matrix_tiles=lambda: True, build_info=lambda: {"openmp": True}
    )
    monkeypatch.setattr(extension, "NATIVE", native)
    of_matmul = {(op, dtype) for op in registry.PRODUCTS for dtype in DTYPES if chosen(op, dtype, "cpu") != "cpp"}
    assert of_matmul == {(op, torch.bfloat16) for op in registry.PRODUCTS if op.endswith("_backward")}


@compiled
@pytest.mark.skipif("amx_int8" not in CPU_FLAGS, reason="this CPU has no AMX tiles, or hides them")
def test_where_the_system_refuses_tiles_the_next_tier_computes_bfloat16_too():
    # Linux refuses them to a process with a signal stack that has no room for their registers.
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
room = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 8192)), None) == 0
import clipup_kernels
info = clipup_kernels.backend_info()
print(info["instructions"], info["cpu"]["expert_mlp"]["bfloat16"])
"""
    assert in_a_fresh_process(code).stdout.split() == ["avx512_vnni", "cpp"]


def test_the_extension_takes_the_openmp_runtime_of_torch_before_those_of_other_packages():
    home = Path("/env/site-packages/torch")
    others = ["/usr/lib/libgomp.so.1.0.0", "/env/site-packages/faiss_cpu.libs/libgomp-a1.so.1.0.0"]
    for own in (f"{home}/lib/libgomp.so.1", f"{home}.libs/libgomp-b2.so.1.0.0"):
        lines = [f"7f00-7f10 r-xp 0000 08:01 1  {path}" for path in (*others, own, "/env/libtorch.so")]
        runtimes = extension._openmp_runtimes("\n".join(["7f00-7f10 rw-p 0000 00:00 0", *lines]), home)
        assert runtimes == [own, *sorted(others)]


def test_what_cannot_run_is_refused_with_the_reason(force_backend, monkeypatch):
    monkeypatch.setattr(extension, "NATIVE", None)
    for device in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match="packed_dense_mlp"):
            registry.choose("packed_dense_mlp", torch.float32, device)
    force_backend("cpp")
    with pytest.raises(RuntimeError, match="CLIPUP_BACKEND=cpp"):
        ck.topk_gating(torch.zeros(2, 3), 1, True)
    force_backend("matmul")
    with pytest.raises(ValueError, match="CLIPUP_BACKEND.*'matmul'"):
        registry.forced()


def test_importing_the_package_imports_no_triton_and_asks_for_no_gpu():
    code = (
        "import torch, torch.utils.flop_counter\n"  # which imports Triton itself
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
    run = in_a_fresh_process(code)
    assert run.returncode == 0, run.stderr


def test_a_gpu_that_triton_does_not_support_runs_torch_after_one_warning(force_backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"plain torch on cuda:3.*7\.5.*8\.0"):
        function = registry.function_of("dispatch", torch.int32, "cuda", 3)
    assert function.__module__ == "clipup_kernels.backends.torch_eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.function_of("permute", torch.float32, "cuda", 3)


@compiled
def test_every_op_has_its_usual_backend(force_backend, modern_gpu):
    for op in ALL_OPS:
        on_triton = any(op in backend.modules for backend in registry.BACKENDS if backend.name == "triton")
        for dtype in (*DTYPES, torch.int32):
            assert chosen(op, dtype, "cuda", 0) == ("triton" if on_triton else "torch_eager")
            assert op in registry.PRODUCTS or chosen(op, dtype, "cpu") == "cpp"
        assert {chosen(op, torch.float64, device, 0) for device in ("cpu", "cuda")} == {"torch_eager"}


def test_a_forced_backend_computes_what_it_has_and_leaves_the_rest_to_the_others(
    force_backend, modern_gpu, monkeypatch
):
    force_backend("torch_eager")
    assert {chosen(op, torch.float32, device, 0) for op in ALL_OPS for device in ("cpu", "cuda")} == {"torch_eager"}
    force_backend("torch_matmul")
    assert chosen("expert_mlp_forward", torch.float32, "cuda", 0) == "triton"
    monkeypatch.setattr(extension, "NATIVE", SimpleNamespace(build_info=lambda: {"cuda": True}))
    assert chosen("topk_gating", torch.float32, "cuda", 0) == "triton"
    force_backend("cpp_cuda")
    assert chosen("topk_gating", torch.float32, "cuda", 0) == chosen("dispatch", torch.int32, "cuda", 0) == "cpp_cuda"
    assert chosen("expert_mlp_forward", torch.float32, "cuda", 0) == "triton"


@compiled
def test_the_compiled_extension_is_what_runs_and_the_record_of_the_machine_says_so():
    info, machine = ck.backend_info(), describe_machine()
    assert info["compiled"] and info["fallback_reason"] is None
    half = dict.fromkeys(("float32", "bfloat16", "float16"), "cpp")
    assert info["cpu"]["permute"] == half | {"float64": "torch_eager"}
    assert info["cpu"]["dispatch"] == half | {"float64": "cpp"}  # it gets indices, whatever the tokens are
    assert info["build"]["openmp"] in (True, False) and info["build"]["compiler"]
    assert machine["processor"] == processor_name() != "" and machine["threads"] == torch.get_num_threads()
    assert all(machine[name] == info[name] for name in ("compiled", "instructions", "matmul_dtypes"))
    json.dumps([info, machine])


ABSENT = "sys.modules['clipup_kernels._C'] = None\n"


@pytest.mark.parametrize(
    ("before", "environment", "shown", "output", "errors"),
    [
        (
            "sys.modules['triton'] = None\n", {"CLIPUP_CPU_ISA": "portable"}, "cuda_fallback_reason", "pip install",
            "portable",
        ),
        ("", {"CLIPUP_CPU_ISA": "sse9"}, "instructions", "", "CLIPUP_CPU_ISA"),
        (ABSENT, {}, "fallback_reason", "_C", "runs without its compiled extension"),
        (
            "sys.modules['clipup_kernels._C'] = types.SimpleNamespace(ACTIVATIONS=('gelu',))\n", {},
            "fallback_reason", "built from other sources", "pip install",
        ),
    ],
    ids=["no triton", "unknown tier", "no extension", "another extension"],
)  # fmt: skip
def test_settings_and_what_is_missing_are_reported(before, environment, shown, output, errors):
    show = f"import clipup_kernels as ck; i = ck.backend_info(); print(i[{shown!r}], file=sys.stdout)\n"
    run = in_a_fresh_process(before + show + "print(i['instructions'], file=sys.stderr)", **environment)
    assert output in run.stdout and errors in run.stderr
    assert (run.returncode == 0) == bool(output), run.stderr
