"""Instructions as functions of blocks and mask: control and warps. Others: ``arithmetic``, ``moves``, ``hopper``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import hopper, moves, warps
from .arithmetic import FORMS, TYPES, halves
from .faults import Fault, Unknown
from .memory import UNSIGNED
from .operands import as_list, reader
from .parser import Instruction, Program

if TYPE_CHECKING:
    from .machine import Blocks

_BITS = {0: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Step = Callable[["Blocks", "np.ndarray | None"], "np.ndarray | int | None"]
"""Returns the number of the next segment, or an array of numbers by thread; None for the following segment."""


@functools.lru_cache
def compiled(program: Program) -> list[list[Step]]:
    """Every segment as functions of blocks and mask.

    Raises:
        Unknown: an instruction, by its name.
    """
    return [
        [_step(program, instruction, number) for instruction in segment.instructions]
        for number, segment in enumerate(program.segments)
    ]


def _step(program: Program, instruction: Instruction, segment: int) -> Step:
    build = next((build for pattern, build in _BUILDERS if re.fullmatch(pattern, instruction.opcode)), None)
    form = FORMS.get(instruction.opcode)
    lists = any(operand.startswith("{") for operand in instruction.operands)
    if form and not (lists and instruction.opcode.startswith("mov")):
        step = _arithmetic(program, instruction, form)
    elif build:
        step = build(program, instruction)
    else:
        raise Unknown(f"{instruction}: unknown instruction")
    step = hopper.guarded(program, instruction, step)
    if not instruction.predicate:
        return step
    read = reader(program, instruction.predicate, "pred")
    jumps = instruction.opcode.startswith(("bra", "ret", "exit"))

    def predicated(blocks: Blocks, mask):
        wanted = ~read(blocks) if instruction.negated else read(blocks)
        if jumps:
            return np.where(wanted, step(blocks, mask), segment + 1).astype(np.int32)
        taken = wanted if mask is None else wanted & mask
        if taken.any():
            step(blocks, None if taken.all() else taken)
        return None

    return predicated


def _arithmetic(program: Program, instruction: Instruction, form) -> Step:
    destination, *operands = instruction.operands
    if len(operands) != len(form.operands):
        raise Unknown(f"{instruction}: {len(form.operands)} operands are known")
    readers = [reader(program, text, kind) for text, kind in zip(operands, form.operands, strict=True)]
    width, compute = program.widths[destination], form.compute
    bits = np.dtype(_BITS[width])

    def step(blocks: Blocks, mask):
        value = compute(*[read(blocks) for read in readers])
        if value.dtype != bits:
            value = value.view(bits) if value.dtype.itemsize == bits.itemsize else value.astype(bits)
        blocks.put(destination, value, mask)

    truncated = re.fullmatch(r"cvt\.rzi\.([su]\d\d)\.f\d\d", instruction.opcode)
    return _fitting(instruction, step, readers[0], np.iinfo(TYPES[truncated[1]])) if truncated else step


def _fitting(instruction: Instruction, step: Step, read, limits: np.iinfo) -> Step:
    """A conversion as C++ has it, which leaves open what becomes of a number that does not fit; only if ``strict``."""

    def fitting(blocks: Blocks, mask):
        if not blocks.launch.memory.strict:
            return step(blocks, mask)
        value = np.trunc(read(blocks).astype(np.float64))
        outside = ~((value >= float(limits.min)) & (value < float(limits.max) + 1))
        if (outside if mask is None else outside & mask).any():
            raise Fault(f"{instruction}: converts a number that does not fit")
        return step(blocks, mask)

    return fitting


def _mov(program: Program, instruction: Instruction) -> Step:
    """``mov`` between a register and a list of narrower registers, lowest bits first."""
    into, source = map(as_list, instruction.operands)
    parts, whole = (into, source[0]) if len(into) > 1 else (source, into[0])
    bits = int(instruction.opcode[5:]) // len(parts)
    if len(into) > 1:
        read = reader(program, whole, f"u{bits * len(parts)}")

        def unpack(blocks: Blocks, mask):
            value = read(blocks)
            for number, name in enumerate(parts):
                if name != "_":
                    blocks.put(name, (value >> value.dtype.type(bits * number)).astype(UNSIGNED[bits // 8]), mask)

        return unpack
    readers = [reader(program, name, f"u{bits}") for name in parts]
    wide = UNSIGNED[bits * len(parts) // 8]

    def pack(blocks: Blocks, mask):
        value = functools.reduce(
            np.bitwise_or, [read(blocks).astype(wide) << wide(bits * n) for n, read in enumerate(readers)]
        )
        blocks.put(whole, value, mask)

    return pack


def _barrier(program: Program, instruction: Instruction) -> Step:
    if instruction.operands not in (("0",), ("0x0",)):
        raise Unknown(f"{instruction}: barrier 0 of the whole block is known")

    def barrier(blocks: Blocks, mask):
        present = np.ones((blocks.count, 1), bool) if mask is None else mask.reshape(blocks.count, -1)
        if (present.any(1) & ~present.all(1)).any():
            raise Fault(f"{instruction}: a part of the block does not reach the barrier")
        blocks.shared.barrier(present[:, 0])

    return barrier


def _warp_barrier(program: Program, instruction: Instruction) -> Step:
    members = reader(program, instruction.operands[0], "b32")

    def barrier(blocks: Blocks, mask):
        present = blocks.warps(mask, members(blocks), instruction)
        if not (members(blocks) == 0xFFFFFFFF).all():
            raise Unknown(f"{instruction}: whole warps are known")
        blocks.shared.warp_barrier(slice(None) if present is None else present)

    return barrier


def _shuffle(program: Program, instruction: Instruction) -> Step:
    mode = instruction.opcode.split(".")[2]
    into, predicate = [*instruction.operands[0].split("|"), None][:2]
    value, by, clamp, members = (reader(program, text, "b32") for text in instruction.operands[1:])

    def shuffle(blocks: Blocks, mask):
        blocks.warps(mask, members(blocks), instruction)
        rows = [read(blocks).reshape(-1, 32) for read in (value, by, clamp)]
        moved, inside = warps.shuffle(mode, *rows)
        blocks.put(into, moved.reshape(-1), mask)
        if predicate:
            blocks.put(predicate, inside.reshape(-1), mask)

    return shuffle


def _match(program: Program, instruction: Instruction) -> Step:
    """``match.any``: for every thread the threads in its mask that have the same value."""
    value, members = (reader(program, text, "b32") for text in instruction.operands[1:])

    def match(blocks: Blocks, mask):
        blocks.warps(mask, members(blocks), instruction)
        rows = value(blocks).reshape(-1, 32)
        same = (rows[:, :, None] == rows[:, None, :]) << np.arange(32, dtype=np.uint32)
        blocks.put(instruction.operands[0], same.sum(2, dtype=np.uint32).reshape(-1) & members(blocks), mask)

    return match


def _reduce(program: Program, instruction: Instruction) -> Step:
    _, _, name, kind = instruction.opcode.split(".")
    reduction = warps.REDUCTIONS[name, kind]
    value, members = (
        reader(program, text, as_) for text, as_ in zip(instruction.operands[1:], (kind, "b32"), strict=True)
    )

    def reduce(blocks: Blocks, mask):
        blocks.warps(mask, members(blocks), instruction)
        if not (members(blocks) == 0xFFFFFFFF).all():
            raise Unknown(f"{instruction}: whole warps are known")
        rows = value(blocks).reshape(-1, 32)
        result = reduction.reduce(rows, axis=1, dtype=rows.dtype)
        blocks.put(instruction.operands[0], np.repeat(result, 32).view(np.uint32), mask)

    return reduce


def _multiply(program: Program, instruction: Instruction) -> Step:
    form = instruction.opcode.split("aligned.")[1]
    into = as_list(instruction.operands[0])
    readers = [[reader(program, name, "b32") for name in as_list(text)] for text in instruction.operands[1:]]

    def multiply(blocks: Blocks, mask):
        blocks.warps(mask, np.full(blocks.lanes, 0xFFFFFFFF, np.uint32), instruction)
        operands = [[read(blocks).reshape(-1, 32) for read in group] for group in readers]
        for name, value in zip(into, warps.multiply(form, *operands), strict=True):
            blocks.put(name, value.reshape(-1), mask)

    return multiply


def _compare_halves(program: Program, instruction: Instruction) -> Step:
    """``setp`` of packed pairs: the first predicate compares the low halves, the second the high halves."""
    form = FORMS[instruction.opcode.removesuffix("x2")]
    names = instruction.operands[0].split("|")
    readers = [reader(program, text, "b32") for text in instruction.operands[1:]]

    def compare(blocks: Blocks, mask):
        high, low = zip(*(halves(read(blocks)) for read in readers), strict=True)
        for name, pair in zip(names, (low, high), strict=True):
            blocks.put(name, form.compute(*(bits.view(TYPES[form.operands[0]]) for bits in pair)), mask)

    return compare


def _jump(program: Program, instruction: Instruction) -> Step:
    target = program.labels[instruction.operands[0]]
    return lambda blocks, mask: target


def _exit(program: Program, instruction: Instruction) -> Step:
    return lambda blocks, mask: -1


def _convert_address(program: Program, instruction: Instruction) -> Step:
    into, source = instruction.operands
    read = reader(program, source, "u64")
    return lambda blocks, mask: blocks.put(into, read(blocks), mask)


_BUILDERS: list[tuple[str, Callable[[Program, Instruction], Step]]] = [
    (r"mov\.b(16|32|64)", _mov),
    (r"bar\.sync", _barrier),
    (r"bar\.warp\.sync", _warp_barrier),
    (r"shfl\.sync\.(up|down|bfly|idx)\.b32", _shuffle),
    (r"match\.any\.sync\.b32", _match),
    (r"redux\.sync\.(add|min|max|and|or|xor)\.[sub]32", _reduce),
    (rf"mma\.sync\.aligned\.({'|'.join(map(re.escape, warps.MATRICES))})", _multiply),
    (r"setp\.(eq|ne|lt|le|gt|ge)u?\.b?f16x2", _compare_halves),
    (r"bra(\.uni)?", _jump),
    (r"ret|exit", _exit),
    (r"cvta\.(to\.global|param)\.u64", _convert_address),
    *moves.BUILDERS,
    *hopper.BUILDERS,
]
