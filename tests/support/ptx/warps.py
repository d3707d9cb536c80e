"""Instructions of whole warps, on arrays [warps, 32]: shuffles (9.7.9), ``redux`` (9.7.13), matrices (9.7.14).

Fragments follow the manual's sections "Matrix Fragments for mma.m16n8k16 with floating point type",
"... for mma.m16n8k8" and "ldmatrix".
"""

from __future__ import annotations

import numpy as np

from .arithmetic import bf16_to_f32, halves, tf32

LANES = np.arange(32)
GROUP, MEMBER = LANES >> 2, LANES & 3
"""A thread's group of four, and its place in it."""


def shuffle(mode: str, values: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [warps, 32] as ``shfl.sync`` moves them, and where the source was in range."""
    segment, limit = (clamp >> 8) & 31, clamp & 31
    by = by & 31
    most = (LANES & segment) | (limit & ~segment)
    least = LANES & segment
    if mode == "up":
        source = LANES - by.astype(np.int64)
        inside = source >= most
    elif mode == "down":
        source = LANES + by.astype(np.int64)
        inside = source <= most
    else:
        source = LANES ^ by.astype(np.int64) if mode == "bfly" else least | (by & ~segment)
        inside = source <= most
    source = np.where(inside, source, LANES).astype(np.int64)
    return np.take_along_axis(values, source, 1), inside


REDUCTIONS = {
    ("add", "s32"): np.add, ("add", "u32"): np.add, ("min", "s32"): np.minimum, ("min", "u32"): np.minimum,
    ("max", "s32"): np.maximum, ("max", "u32"): np.maximum, ("and", "b32"): np.bitwise_and,
    ("or", "b32"): np.bitwise_or, ("xor", "b32"): np.bitwise_xor,
}  # fmt: skip


def _left(registers: int, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [registers, elements, 32] of A; ``wide``: a register has one element (TF32), else two."""
    register = np.arange(registers)[:, None, None]
    element = np.arange(1 if wide else 2)[None, :, None]
    row = GROUP + 8 * (register % 2) + 0 * element
    column = MEMBER + 4 * (register // 2) if wide else MEMBER * 2 + element + 8 * (register // 2)
    return row, column + 0 * element


def _right(registers: int, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    register = np.arange(registers)[:, None, None]
    element = np.arange(1 if wide else 2)[None, :, None]
    row = MEMBER + 4 * register if wide else MEMBER * 2 + element + 8 * register
    return row + 0 * element, GROUP + 0 * (register + element)


def _sum_places() -> tuple[np.ndarray, np.ndarray]:
    register = np.arange(4)[:, None]
    return GROUP + 8 * (register // 2), MEMBER * 2 + register % 2


_SUMS = _sum_places()
MATRICES = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": ("bf16", 16), "m16n8k16.row.col.f32.f16.f16.f32": ("f16", 16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": ("tf32", 8),
}  # fmt: skip


def _operand(registers: list[np.ndarray], kind: str, rows: int, columns: int, places) -> np.ndarray:
    """A matrix [warps, rows, columns] in float32 from registers [warps, 32]."""
    matrix = np.empty((len(registers[0]), rows, columns), np.float32)
    row, column = places(len(registers), kind == "tf32")
    for number, register in enumerate(registers):
        if kind == "tf32":
            matrix[:, row[number, 0], column[number, 0]] = tf32(register.view(np.float32))
            continue
        high, low = halves(register)
        for element, bits in enumerate((low, high)):
            value = bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16)
            matrix[:, row[number, element], column[number, element]] = value
    return matrix


def multiply(form: str, left: list, right: list, sums: list) -> list[np.ndarray]:
    """``mma``: the sums' registers, each [warps, 32] in bits. Products are summed in float32, in numpy's order."""
    kind, depth = MATRICES[form]
    a = _operand(left, kind, 16, depth, _left)
    b = _operand(right, kind, depth, 8, _right)
    total = np.matmul(a, b)
    return [(total[:, _SUMS[0][n], _SUMS[1][n]] + sums[n].view(np.float32)).view(np.uint32) for n in range(4)]


def matrix_rows(addresses: np.ndarray, number: int) -> np.ndarray:
    """Addresses [warps, 32] of the row that each thread's elements of matrix ``number`` come from, not transposed."""
    return addresses[:, number * 8 + GROUP]


def transposed_rows(addresses: np.ndarray, number: int, element: int) -> np.ndarray:
    """The same for element 0 or 1 of a transposed matrix."""
    return addresses[:, number * 8 + MEMBER * 2 + element]
