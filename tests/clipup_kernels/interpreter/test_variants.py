"""What ``variants`` of the kernel files yield, and all of it compiled for architectures that need not be there.

Compiling takes a process of its own: in this one Triton interprets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipup_kernels.triton import (
    dispatch,
    expert_mlp,
    expert_mlp_backward,
    grouped_linear,
    router_logits,
    rows,
    topk_gating,
    variants,
    weight_gradient,
)

pytestmark = pytest.mark.interpreter

GPU_STATIC = Path(__file__).parents[3] / "benchmarks" / "gpu_static.py"
PRODUCTS = (expert_mlp, expert_mlp_backward, grouped_linear, weight_gradient)
FILES = (*PRODUCTS, dispatch, router_logits, rows, topk_gating)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
@pytest.mark.parametrize("arch", variants.ARCHITECTURES)
def test_every_kernel_compiles_within_its_limits(arch, file):
    """No stack, shared memory within the card's, tensor cores where they are meant to be used."""
    names = {variant.name for variant in file.variants(arch)}
    environment = {variable: value for variable, value in os.environ.items() if variable != "TRITON_INTERPRET"}
    command = [sys.executable, str(GPU_STATIC), "--arch", str(arch), "--match", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith(" 0 failures")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
@pytest.mark.parametrize("arch", variants.ARCHITECTURES)
def test_a_variant_says_everything_that_a_launch_would(arch, file):
    seen = set()
    for variant in file.variants(arch):
        assert variant.name not in seen
        seen.add(variant.name)
        assert list(variant.signature) == list(variant.kernel.arg_names)
        constexpr = {name for name, kind in variant.signature.items() if kind == "constexpr"}
        assert constexpr == set(variant.constants)
        assert {"num_warps", "num_stages", "enable_fp_fusion"} == set(variant.options)
        if " half " in variant.name:
            assert variant.instructions[0] == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
        assert ("UTMALDG" in variant.instructions) == ("descriptors" in variant.name)


def test_instructions_are_counted_whole():
    sass = "HGMMA.64x128x16.F32.BF16 R24;\n HMMA.16816.F32 R4;\n HMMA.1688.F32.TF32 R8;"
    assert [variants.count(name, sass) for name in ("HMMA", "HGMMA", "MMA")] == [2, 1, 0]
