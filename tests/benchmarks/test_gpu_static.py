"""The table of compiled kernels: what it lets pass and what it calls a failure."""

import gpu_static
import pytest

from clipup_kernels.triton import variants
from clipup_kernels.triton.variants import SHARED_BYTES, Compiled

FINE = Compiled(registers=64, stack_bytes=0, shared_bytes=1024, sass="HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]", ptx="")


@pytest.mark.parametrize(
    ("compiled", "words"),
    [
        (FINE, "ok"),
        (FINE._replace(stack_bytes=gpu_static.MOST_STACK), "ok"),
        (FINE._replace(stack_bytes=gpu_static.MOST_STACK + 8), "24 bytes of stack"),
        (FINE._replace(shared_bytes=SHARED_BYTES[90] + 16), "limit by 16 bytes"),
        (None, "does not compile: no such layout"),
    ],
)
def test_a_fault_is_named_and_counted(monkeypatch, capsys, compiled, words):
    def compile_variant(variant, arch):
        if compiled is None:
            raise ValueError("no such layout")
        return compiled

    monkeypatch.setattr(variants, "compile_variant", compile_variant)
    failures = int(words != "ok")
    assert gpu_static.main(["--arch", "90", "--match", "permute fp16"]) == failures
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"1 kernels, {failures} failures" and lines[1].endswith(words)


def test_kernels_whose_epilogue_is_hidden_by_a_second_block_leave_it_its_registers():
    kernels = {v.name: v for v in gpu_static.all_variants(90)}
    gated = kernels["project_in_gated silu bf16 half 128x64x64 w8"]
    plain = [kernels[f"project_back {act} bf16 half 128x128x64 w8"] for act in ("gelu", "quick_gelu", "relu")]
    for variant in (gated, *plain):
        assert gpu_static.faults(variant._replace(instructions=()), FINE._replace(registers=128), 90) == []
        assert gpu_static.faults(variant, FINE._replace(registers=129), 90)[0] == "129 registers, 128 at most"
    assert gpu_static.faults(gated, FINE._replace(stack_bytes=64, sass=""), 100) == []
    assert gpu_static.faults(gated._replace(instructions=("HGMMA", "UTMALDG")), FINE, 90) == ["no UTMALDG"]
