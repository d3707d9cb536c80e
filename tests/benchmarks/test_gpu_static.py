"""The table of compiled kernels: what it lets pass and what it calls a failure."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_static
import pytest

from clipup_kernels.triton import variants
from clipup_kernels.triton.variants import SHARED_BYTES, Compiled

FINE = Compiled(registers=64, stack_bytes=0, shared_bytes=1024, sass="HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]")


def run(*options: str) -> subprocess.CompletedProcess:
    """The program by itself: in this process Triton may be interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(gpu_static.__file__)), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def table(monkeypatch, capsys, compiled, **changes):
    """Exit status and lines of a table in which every kernel compiles to ``compiled``."""

    def compile_variant(variant, arch):
        if isinstance(compiled, Exception):
            raise compiled
        return compiled._replace(**changes)

    monkeypatch.setattr(variants, "compile_variant", compile_variant)
    status = gpu_static.main(["--arch", "90", "--match", "permute fp16"])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def test_a_kernel_of_ours_passes_on_every_architecture(arch):
    result = run("--arch", str(arch), "--match", "permute bf16, odd width")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "1 kernels, 0 failures"


@pytest.mark.slow
def test_every_kernel_passes_on_every_architecture():
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].endswith(" kernels, 0 failures")


def test_a_table_without_faults_exits_with_zero(monkeypatch, capsys):
    status, lines = table(monkeypatch, capsys, FINE)
    assert status == 0 and lines[-1] == "1 kernels, 0 failures" and lines[1].endswith("ok")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"shared_bytes": SHARED_BYTES[90] + 16}, "shared memory over the limit by 16 bytes"),
    ],
)
def test_a_fault_is_named_and_counted(monkeypatch, capsys, changes, words):
    status, lines = table(monkeypatch, capsys, FINE, **changes)
    assert status == 1 and lines[-1] == "1 kernels, 1 failures" and words in lines[1]


def test_a_kernel_that_does_not_compile_is_a_failure(monkeypatch, capsys):
    status, lines = table(monkeypatch, capsys, ValueError("no such layout"))
    assert status == 1 and lines[-1] == "1 kernels, 1 failures" and "does not compile: no such layout" in lines[1]


def test_instructions_that_are_meant_must_be_there():
    variant = next(gpu_static.all_variants(90))._replace(instructions=("HGMMA", "UTMALDG"))
    assert gpu_static.faults(variant, FINE, 90) == ["no UTMALDG"]


def test_kernels_whose_epilogue_is_hidden_by_a_second_block_leave_it_its_registers():
    kernels = {v.name: v for v in gpu_static.all_variants(90) if v.name.startswith(("project_in", "project_back"))}
    limited = {name for name, variant in kernels.items() if variant.most_registers == 128}
    assert {f"project_back {act} bf16 half 128x128x64 w8" for act in ("gelu", "quick_gelu", "relu")} <= limited
    assert {"project_in gelu bf16 half 128x128x64 w8", "project_in_gated silu bf16 half 128x64x64 w8"} <= limited
    variant = kernels["project_back gelu bf16 half 128x128x64 w8"]
    assert gpu_static.faults(variant, FINE._replace(registers=128), 90) == []
    assert gpu_static.faults(variant, FINE._replace(registers=129), 90) == ["129 registers, 128 at most"]


def test_a_match_without_kernels_is_a_failure(capsys):
    assert gpu_static.main(["--match", "no kernel has this name"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 kernels, 0 failures"


def test_every_stage_is_in_the_table():
    names = {variant.name.split()[0] for variant in gpu_static.all_variants(90)}
    routing = {"gating", "gating_reduce", "gating_backward", "dispatch_count", "dispatch_scan", "dispatch_assign"}
    assert routing | {"permute", "gather_sum", "combine", "combine_backward"} <= names
