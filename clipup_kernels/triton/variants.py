"""Compiling kernels for an architecture without a GPU: the items that ``variants(arch)`` of a kernel file yields, and
their registers, stack, shared memory and machine code.

``compile_variant`` does not work under ``TRITON_INTERPRET=1``, which interprets kernels instead of compiling them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that the kernels are compiled for without a GPU; for 100 no more than that."""

SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block may have, by architecture (CUDA C++ Programming Guide, technical specifications). 80
stands for 8.6, 8.9 and 12.0 too, which have less than 8.0."""

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names of the kernels' storage types."""


class Variant(NamedTuple):
    """One specialisation of a kernel."""

    name: str
    kernel: Any
    """The ``triton.JITFunction``."""
    signature: dict[str, str]
    """Every argument's type in the kernel's order: "*bf16" (a pointer, divisible by 16 as torch allocates), "i32",
    "i32:16" (an int divisible by 16), "i64", "fp32" or "constexpr"."""
    constants: dict[str, Any]
    """The value of every constexpr; None for a pointer that is absent."""
    options: dict[str, int]
    """``num_warps`` and ``num_stages``."""
    instructions: tuple[str, ...] = ()
    """Machine instructions that must occur, for example "HGMMA"."""
    most_registers: int | None = None
    """Per thread, where two blocks are meant to share a multiprocessor; None: any number."""


class Compiled(NamedTuple):
    """A compiled variant."""

    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread: spilled registers, and arrays in local memory."""
    shared_bytes: int
    """Per block."""
    sass: str
    """Machine code as text."""
    ptx: str


def signature(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """The types of all of the kernel's arguments in its order, those in ``constants`` being constexpr."""
    return {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compiles ``variant`` for compute capability ``arch`` / 10."""
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (position,): divisible
        for position, kind in enumerate(variant.signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in variant.signature.items()}
    source = ASTSource(variant.kernel, types, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    return Compiled(registers, stack, compiled.metadata.shared, sass, compiled.asm["ptx"])


def count(instruction: str, sass: str) -> int:
    """Occurrences of a machine instruction with any suffix: "HGMMA" counts HGMMA.64x128x16.F32.BF16."""
    return len(re.findall(rf"\b{instruction}\b", sass))
