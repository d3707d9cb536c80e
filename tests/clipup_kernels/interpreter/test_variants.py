"""What ``variants`` of the kernel files yield, compiled for architectures that need not be there.

Compiling takes a process of its own: in this one Triton interprets.
"""

import json
import os
import subprocess
import sys

import pytest

from clipup_kernels.triton import dispatch, router_logits, rows, topk_gating, variants

pytestmark = pytest.mark.interpreter

COMPILE = """
import json, sys
from clipup_kernels.triton import dispatch, router_logits, rows, topk_gating, variants

arch, *names = sys.argv[1:]
for file in (dispatch, topk_gating, router_logits, rows):
    for variant in file.variants(int(arch)):
        if not names or variant.name in names:
            compiled = variants.compile_variant(variant, int(arch))
            print(json.dumps([variant.name, *compiled[:3], variants.count("EXIT", compiled.sass)]))
"""

USUAL = ["gating E=8 K=2", "gating_backward E=8 K=2", "gating_reduce E=8 K=2", "permute bf16", "combine bf16"]
USUAL += ["combine_backward bf16", "dispatch_count E=8 K=2", "dispatch_scan E=8 K=2", "dispatch_assign E=8 K=2"]
USUAL += ["router_logits bf16", "router_d_x bf16", "router_weight_sums bf16", "router_add_up"]


def assert_all_sound(arch: int, *names: str) -> set[str]:
    """Compiles the variants of these names, or all; returns the names of those that were."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = set()
    for name, registers, stack_bytes, shared_bytes, exits in map(json.loads, run.stdout.splitlines()):
        seen.add(name)
        assert exits > 0, f"{name}: no machine code on sm_{arch}"
        assert stack_bytes == 0, f"{name} spills {stack_bytes} bytes on sm_{arch}"
        # A multiprocessor holds at least three programs of 4 warps.
        assert 0 < registers <= 168, f"{name} needs {registers} registers on sm_{arch}"
        assert shared_bytes <= 48 * 1024, f"{name} needs {shared_bytes} bytes of shared memory on sm_{arch}"
    return seen


@pytest.mark.slow
def test_the_usual_kernels_compile_without_a_stack():
    assert assert_all_sound(90, *USUAL) == set(USUAL)


@pytest.mark.slow
@pytest.mark.parametrize("arch", variants.ARCHITECTURES)
def test_every_kernel_compiles_without_a_stack(arch):
    files = (dispatch, topk_gating, router_logits, rows)
    expected = {variant.name for file in files for variant in file.variants(arch)}
    assert assert_all_sound(arch) == expected


@pytest.mark.parametrize(
    "file", [router_logits, topk_gating, dispatch, rows], ids=lambda file: file.__name__.rpartition(".")[2]
)
def test_a_variant_says_everything_that_a_launch_would(file):
    seen = set()
    for variant in file.variants(90):
        assert variant.name not in seen
        seen.add(variant.name)
        assert list(variant.signature) == list(variant.kernel.arg_names)
        constexpr = {name for name, kind in variant.signature.items() if kind == "constexpr"}
        assert constexpr == set(variant.constants)
        assert {"num_warps", "num_stages", "enable_fp_fusion"} == set(variant.options)


def test_instructions_are_counted_whole():
    sass = "HGMMA.64x128x16.F32.BF16 R24;\n HMMA.16816.F32 R4;\n HMMA.1688.F32.TF32 R8;"
    assert variants.count("HMMA", sass) == 2 and variants.count("HGMMA", sass) == 1 and variants.count("MMA", sass) == 0
