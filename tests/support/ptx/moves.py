"""Loads, stores and copies between registers, shared and global memory (9.7.9 and 9.7.14.5)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import warps
from .arithmetic import TYPES
from .faults import Fault, Unknown
from .memory import UNSIGNED
from .operands import address_of, as_list, reader
from .parser import Instruction, Program

if TYPE_CHECKING:
    from .machine import Blocks

Step = Callable[["Blocks", "np.ndarray | None"], "np.ndarray | int | None"]


def _load(program: Program, instruction: Instruction) -> Step:
    space, kind = re.search(r"\.(param|global|shared)", instruction.opcode)[1], instruction.opcode.rsplit(".", 1)[1]
    names = as_list(instruction.operands[0])
    size = np.dtype(TYPES[kind]).itemsize
    base, offset = address_of(instruction.operands[1])
    if space == "param":
        at = program.parameters[base][0] + offset

        def load_argument(blocks: Blocks, mask):
            data = np.frombuffer(blocks.launch.arguments, np.uint8, size * len(names), at).view(TYPES[kind])
            for name, value in zip(names, data, strict=True):
                blocks.put(name, _widened(np.full(blocks.lanes, value), program, name), mask)

        return load_argument
    read = reader(program, base, "u64" if space == "global" else "u32")

    def load(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        address = read(blocks)[lanes].astype(np.int64) + offset
        if space == "global":
            values = blocks.launch.memory.read(address, size, len(names), blocks.owners(lanes), instruction)
        else:
            index = blocks.shared.at(lanes, address, size, len(names), instruction)
            values = blocks.shared.read(lanes, index, size, instruction)
        _scatter(blocks, program, names, values.view(TYPES[kind]), lanes, mask)

    return load


def _widened(value: np.ndarray, program: Program, name: str) -> np.ndarray:
    """A loaded value as wide as its register; signed types are sign-extended."""
    bits = program.widths[name]
    if np.issubdtype(value.dtype, np.signedinteger):
        value = value.astype(f"i{bits // 8}")
    return value.view(UNSIGNED[bits // 8]) if value.dtype.itemsize * 8 == bits else value.astype(UNSIGNED[bits // 8])


def _scatter(blocks: Blocks, program: Program, names, values, lanes, mask) -> None:
    """Registers from values [threads that take part, registers]."""
    for number, name in enumerate(names):
        value = _widened(np.ascontiguousarray(values[:, number]), program, name)
        if mask is not None:
            full = np.zeros(blocks.lanes, value.dtype)
            full[lanes] = value
            value = full
        blocks.put(name, value, mask)


def _store(program: Program, instruction: Instruction) -> Step:
    kind = instruction.opcode.rsplit(".", 1)[1]
    size = np.dtype(TYPES[kind]).itemsize
    base, offset = address_of(instruction.operands[0])
    is_global = ".global" in instruction.opcode
    read = reader(program, base, "u64" if is_global else "u32")
    readers = [reader(program, name, f"u{8 * size}") for name in as_list(instruction.operands[1])]

    def store(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        address = read(blocks)[lanes].astype(np.int64) + offset
        values = np.stack([value(blocks)[lanes] for value in readers], 1)
        if is_global:
            blocks.launch.memory.write(address, values, size, blocks.owners(lanes), instruction)
        else:
            index = blocks.shared.at(lanes, address, size, len(readers), instruction)
            blocks.shared.write(lanes, index, values, size, instruction)

    return store


def _add(program: Program, instruction: Instruction) -> Step:
    """Atomic addition in shared memory. The value before depends on the order of threads: nothing may read it."""
    *into, target, value = instruction.operands
    others = " ".join(str(other) for other in program.instructions if other is not instruction)
    if into and into[0] in re.findall(r"%\w+", others):
        raise Unknown(f"{instruction}: a value before an addition that is read")
    base, offset = address_of(target)
    read, values = reader(program, base, "u32"), reader(program, value, instruction.opcode.rsplit(".", 1)[1])

    def add(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        index = blocks.shared.at(lanes, read(blocks)[lanes].astype(np.int64) + offset, 4, 1, instruction)
        blocks.shared.add(lanes, index, values(blocks)[lanes, None], 4, instruction)

    return add


def _copy(program: Program, instruction: Instruction) -> Step:
    """``cp.async`` of 4, 8 or 16 bytes: the source's, or zeros if the given source size is 0."""
    target, source = map(address_of, instruction.operands[:2])
    count = int(instruction.operands[2], 0)
    to, origin = reader(program, target[0], "u32"), reader(program, source[0], "u64")
    given = instruction.operands[3:]
    filled = reader(program, given[0], "u32") if given else lambda blocks: np.full(blocks.lanes, count, np.uint32)

    def copy(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        shared, memory = blocks.shared, blocks.launch.memory
        sizes = filled(blocks)[lanes]
        if not np.isin(sizes, (0, count)).all():
            raise Unknown(f"{instruction}: source sizes of 0 and {count} bytes are known")
        values = np.zeros((len(lanes), count // 4), np.uint32)
        reads = sizes > 0
        address = origin(blocks)[lanes].astype(np.int64) + source[1]
        if reads.any():
            values[reads] = memory.read(address[reads], 4, count // 4, blocks.owners(lanes[reads]), instruction)
        index = shared.at(lanes, to(blocks)[lanes].astype(np.int64) + target[1], 4, count // 4, instruction)
        shared.copy(lanes, index, values, 4, instruction)

    return copy


def _commit(program: Program, instruction: Instruction) -> Step:
    return lambda blocks, mask: blocks.shared.commit(blocks.active(mask))


def _wait(program: Program, instruction: Instruction) -> Step:
    open_groups = int(instruction.operands[0], 0) if instruction.operands else 0
    return lambda blocks, mask: blocks.shared.wait(blocks.active(mask), open_groups)


def _load_matrix(program: Program, instruction: Instruction) -> Step:
    names = as_list(instruction.operands[0])
    base, offset = address_of(instruction.operands[1])
    read, is_transposed = reader(program, base, "u32"), ".trans" in instruction.opcode
    within = warps.GROUP * 2 if is_transposed else warps.MEMBER * 4

    def load_matrix(blocks: Blocks, mask):
        present = blocks.warps(mask, np.full(blocks.lanes, 0xFFFFFFFF, np.uint32), instruction)
        addresses = read(blocks).astype(np.int64).reshape(-1, 32) + offset
        lanes, shared = blocks.active(mask), blocks.shared
        rows = addresses if present is None else addresses[present]
        if (rows[:, : 8 * len(names)] % 16).any():
            raise Fault(f"{instruction}: a row's address is not a multiple of 16")
        for number, name in enumerate(names):
            if is_transposed:
                parts = []
                for element in (0, 1):
                    at = (warps.transposed_rows(addresses, number, element) + within).reshape(-1)[lanes]
                    parts.append(shared.read(lanes, shared.at(lanes, at, 2, 1, instruction), 2, instruction)[:, 0])
                value = parts[1].astype(np.uint32) << np.uint32(16) | parts[0]
            else:
                at = (warps.matrix_rows(addresses, number) + within).reshape(-1)[lanes]
                value = shared.read(lanes, shared.at(lanes, at, 4, 1, instruction), 4, instruction)[:, 0]
            _scatter(blocks, program, [name], value[:, None], lanes, mask)

    return load_matrix


BUILDERS: list[tuple[str, Callable[[Program, Instruction], Step]]] = [
    (r"ld\.(param|global|shared)(\.nc)?(\.v[24])?\.[bsuf](8|16|32|64)", _load),
    (r"st\.(global|shared|shared::cta)(\.v[24])?\.[bsuf](8|16|32|64)", _store),
    (r"(atom|red)\.shared\.add\.[su]32", _add),
    (r"cp\.async\.c[ag]\.shared\.global", _copy),
    (r"cp\.async\.commit_group", _commit),
    (r"cp\.async\.wait_(group|all)", _wait),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", _load_matrix),
]
