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
    """Hardly a spill, shared memory within the card's, tensor cores where they are meant to be used."""
    names = {variant.name for variant in file.variants(arch)}
    environment = {variable: value for variable, value in os.environ.items() if variable != "TRITON_INTERPRET"}
    command = [sys.executable, str(GPU_STATIC), "--arch", str(arch), "--match", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith(" 0 failures")
