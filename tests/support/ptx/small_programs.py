"""Kernels of a few lines, for tests of the executor."""

from __future__ import annotations

import struct

import numpy as np

from . import machine, parser

ZEROS = "mov.b32 %r9, memory;\nadd.s32 %m, %o, %r9;\nst.shared.b32 [%m], 0;\nbar.sync 0;\n"
ADDED = "and.b32 %r2, %o, 28;\nadd.s32 %r2, %r2, %r9;\n"  # the threads' place modulo 8


def program(body: str, parameters: int, shared: int = 0) -> parser.Program:
    """A kernel with pointers p0, p1, ...; %t is the thread, %o its offset for 4 bytes."""
    declared = ",\n".join(f".param .u64 p{number}" for number in range(parameters))
    pointers = "\n".join(f"ld.param.b64 %a{n}, [p{n}];" for n in range(parameters))
    array = f".shared .align 16 .b8 memory[{shared}];" if shared else ""
    return parser.parse(
        f".version 8.8\n.target sm_80\n{array}\n.visible .entry kernel(\n{declared}\n)\n{{\n"
        ".reg .pred %p<9>; .reg .b16 %s<20>; .reg .b32 %r<20>, %t, %o, %c, %m; .reg .b64 %a<9>, %d<20>, %w;\n"
        f"{pointers}\nmov.u32 %t, %tid.x;\nmov.u32 %c, %ctaid.x;\nshl.b32 %o, %t, 2;\nmul.wide.u32 %w, %t, 4;\n"
        f"{body}\nret;\n}}\n"
    )


def run(body: str, *arrays: np.ndarray, blocks: int = 1, threads: int = 64, shared: int = 0, strict=False) -> None:
    extents = [(array.ctypes.data, array.nbytes, f"array {n}") for n, array in enumerate(arrays)]
    arguments = b"".join(struct.pack("<Q", start) for start, _, _ in extents)
    machine.launch(program(body, len(arrays), shared), (blocks, 1, 1), threads, arguments, extents, strict=strict)
