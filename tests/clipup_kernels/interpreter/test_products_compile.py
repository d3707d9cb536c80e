"""The grouped products compiled without a GPU: no stack, shared memory within limits, tensor cores where meant.

Compiling takes a process of its own: in this one Triton interprets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipup_kernels.triton import (
    expert_mlp,
    expert_mlp_backward,
    grouped_linear,
    variants,
    weight_gradient,
)

pytestmark = pytest.mark.interpreter

GPU_STATIC = Path(__file__).parents[3] / "benchmarks" / "gpu_static.py"
FILES = (expert_mlp, expert_mlp_backward, grouped_linear, weight_gradient)
MAIN = (
    "project_in gelu bf16 half 128x128x64",
    "project_rows forward bf16 half 128x256x64",
    "project_back gelu bf16 half 128x128x64",
    "expert_gradients plain bf16 half 128x256x64",
)


def checked(arch: int, *names: str) -> str:
    """The last line of gpu_static, which must find nothing wrong with variants whose names hold one of ``names``."""
    environment = {variable: value for variable, value in os.environ.items() if variable != "TRITON_INTERPRET"}
    command = [sys.executable, str(GPU_STATIC), "--arch", str(arch), "--match", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_usual_products_use_hoppers_tensor_cores_and_no_stack():
    assert checked(90, *MAIN).endswith(" 0 failures")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        "project_in",
        "project_rows",
        "project_back",
        "gate_gradient",
        "weight_gradient",
        "expert_gradients",
    ],
)
@pytest.mark.parametrize("arch", variants.ARCHITECTURES)
def test_every_product_compiles_within_its_limits(arch, kernel):
    assert checked(arch, kernel).endswith(" 0 failures")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
@pytest.mark.parametrize("arch", variants.ARCHITECTURES)
def test_products_in_half_precision_ask_for_tensor_core_instructions(arch, file):
    seen = set()
    for variant in file.variants(arch):
        assert variant.name not in seen
        seen.add(variant.name)
        assert list(variant.signature) == list(variant.kernel.arg_names)
        if " half " in variant.name:
            assert variant.instructions[0] == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
        assert ("UTMALDG" in variant.instructions) == ("descriptors" in variant.name)
