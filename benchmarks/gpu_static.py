"""Every Triton kernel compiled for every architecture, without a GPU: registers, stack, shared memory, instructions.

    python benchmarks/gpu_static.py                             all of them; minutes
    python benchmarks/gpu_static.py --arch 90 --match dispatch  those whose name holds "dispatch", for sm_90

A kernel fails when it does not compile, when its shared memory is more than a block may have on the architecture, when
it spills more than a few registers, when two of its blocks are meant to share a multiprocessor and its registers do not
allow it, or when machine instructions are missing that it is meant to use. For sm_100 it is compiled and no more: its
tiles are those of sm_90. The last line counts kernels and failures; the exit status is 1 when there are failures or
nothing was compiled.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator

from harness import parser

import clipup_kernels.triton
from clipup_kernels.triton import variants
from clipup_kernels.triton.variants import ARCHITECTURES, SHARED_BYTES, Compiled, Variant

INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")
"""Counted in the table: tensor cores of sm_90 and of sm_80; loads by TMA and by cp.async."""
MOST_STACK = 16
"""Bytes: four registers. In every version of Triton the assembler spills up to that in one to three kernels, each time
others, so that a further block fits on a multiprocessor."""
COLUMNS = ("arch", "kernel", "registers", "stack", "shared", "limit", *INSTRUCTIONS, "verdict")
LINE = "{:6} {:52} {:>9} {:>5} {:>7} {:>7} {:>5} {:>5} {:>7} {:>6} {}"


def all_variants(arch: int) -> Iterator[Variant]:
    """What every kernel file may launch on ``arch``."""
    for file in pkgutil.iter_modules(clipup_kernels.triton.__path__):
        module = importlib.import_module(f"{clipup_kernels.triton.__name__}.{file.name}")
        listed = getattr(module, "variants", None)
        if inspect.isfunction(listed):  # where it is a module, the file has imported variants.py
            yield from listed(arch)


def faults(variant: Variant, compiled: Compiled, arch: int) -> list[str]:
    """What is off about a compiled variant, in words."""
    if arch == 100:
        return []
    words = []
    if compiled.stack_bytes > MOST_STACK:
        words.append(f"{compiled.stack_bytes} bytes of stack")
    if compiled.shared_bytes > SHARED_BYTES[arch]:
        words.append(f"shared memory over the limit by {compiled.shared_bytes - SHARED_BYTES[arch]} bytes")
    if variant.most_registers and compiled.registers > variant.most_registers:
        words.append(f"{compiled.registers} registers, {variant.most_registers} at most")
    missing = [name for name in variant.instructions if not variants.count(name, compiled.sass)]
    return words + [f"no {name}" for name in missing]


def checked(variant: Variant, arch: int) -> tuple[object, ...]:
    """A variant's row of the table; the verdict is "ok" if all is well with it."""
    try:
        compiled = variants.compile_variant(variant, arch)
    except Exception as error:  # the compiler's own, of many kinds: it is counted, and the table continues
        return (f"sm_{arch}", variant.name, *("",) * (len(COLUMNS) - 3), f"does not compile: {error}")
    counts = (variants.count(name, compiled.sass) for name in INSTRUCTIONS)
    numbers = (compiled.registers, compiled.stack_bytes, compiled.shared_bytes, SHARED_BYTES[arch], *counts)
    return (f"sm_{arch}", variant.name, *numbers, "; ".join(faults(variant, compiled, arch)) or "ok")


def main(argv: list[str] | None = None) -> int:
    options = {
        "--arch": {"type": int, "nargs": "+", "choices": ARCHITECTURES, "default": ARCHITECTURES},
        "--match": {"nargs": "+", "default": [""], "help": "names hold one of these (default: all kernels)"},
    }
    args = parser(__doc__, options).parse_args(argv)
    print(LINE.format(*COLUMNS))
    verdicts = []
    for arch in args.arch:
        for variant in all_variants(arch):
            if any(text in variant.name for text in args.match):
                row = checked(variant, arch)
                print(LINE.format(*row), flush=True)
                verdicts.append(row[-1])
    failures = len(verdicts) - verdicts.count("ok")
    print(f"{len(verdicts)} kernels, {failures} failures")
    return int(failures > 0 or not verdicts)


if __name__ == "__main__":
    sys.exit(main())
