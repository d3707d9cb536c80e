"""A launch: all threads of some blocks at a time, in lockstep where they are at one place, else by a mask.

Of the places where threads are, the first in the text goes on. So threads that have parted meet again where the
compiler lets paths join, as on a GPU. Barriers wait until all threads of their block are there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from . import warps
from .arithmetic import FORMS, TYPES
from .faults import Fault, Unknown
from .memory import UNSIGNED, Global, Shared
from .parser import Instruction, Program

MOST_LANES = 8192
"""Threads that run together."""
_BITS = {0: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_CODE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
Step = Callable[["Blocks", "np.ndarray | None"], None]


class Blocks:
    """Some blocks of a launch, and their registers [threads of all blocks]."""

    def __init__(self, program: Program, launch: Launch, first: int, count: int) -> None:
        self.program, self.launch, self.count = program, launch, count
        threads = launch.threads
        self.lanes = count * threads
        self.registers: dict[str, np.ndarray] = {}
        lane = np.arange(self.lanes)
        self.lane, self.block_of_lane = lane, (lane // threads + first).astype(np.int32)
        x, y, _ = launch.grid
        block = self.block_of_lane
        self.special = {
            "%tid.x": lane % threads, "%laneid": lane % threads % 32, "%warpid": lane % threads // 32,
            "%ctaid.x": block % x, "%ctaid.y": block // x % y, "%ctaid.z": block // (x * y),
        }  # fmt: skip
        constant = {"%ntid.x": threads, "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": launch.grid[2]}
        constant |= {f"%{name}.{axis}": 1 if name == "ntid" else 0 for name in ("ntid", "tid") for axis in "yz"}
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.special |= {name: np.full(self.lanes, value, np.uint32) for name, value in constant.items()}
        self.shared = Shared(count, launch.shared_bytes, threads, launch.granule)

    def put(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        before = self.registers.get(name)
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,)).copy()
        self.registers[name] = value if mask is None or before is None else np.where(mask, value, before)

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        """Numbers of the threads that take part."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def warps(self, mask: np.ndarray | None, members: np.ndarray, instruction: Instruction) -> np.ndarray | None:
        """The warps that take part, None for all. Every thread must that is in the bits ``members`` of such a warp."""
        if mask is None:
            return None
        present = mask.reshape(-1, 32)
        named = (members.reshape(-1, 32) >> np.arange(32, dtype=np.uint32) & 1).astype(bool)
        wanted = present.any(1)[:, None] & named
        if (wanted & ~present).any():
            raise Fault(f"{instruction}: executed by a part of the warp only")
        return present.any(1)


class Launch:
    """What all blocks share."""

    def __init__(
        self, program: Program, grid, threads: int, arguments: bytes, memory: Global, shared_bytes: int
    ) -> None:
        if threads % 32:
            raise Unknown(f"{threads} threads a block: whole warps are known")
        self.grid, self.threads, self.arguments, self.memory = grid, threads, arguments, memory
        self.shared_bytes = max(shared_bytes, program.shared_bytes, 16)
        self.granule = min([4, *(_element_bytes(i) for i in program.instructions if ".shared" in i.opcode)])


def _element_bytes(instruction: Instruction) -> int:
    match = re.search(r"\.[bsuf](8|16|32|64)$", instruction.opcode)
    return _CODE_BYTES[match[1]] if match else 4


def launch(
    program: Program, grid: tuple[int, int, int], threads: int, arguments: bytes,
    extents: Sequence[tuple[int, int, str]], shared_bytes: int = 0,
) -> None:  # fmt: skip
    """Runs a kernel on memory of this process.

    Args:
        arguments: the parameters, laid out as ``program.parameters``.
        extents: address, bytes and name of every tensor that the kernel may touch.
        shared_bytes: dynamic shared memory.

    Raises:
        Fault: what the GPU leaves undefined. Unknown: an instruction that the executor does not have.
    """
    steps = compiled(program)
    state = Launch(program, grid, threads, arguments, Global(list(extents)), shared_bytes)
    number = grid[0] * grid[1] * grid[2]
    at_once = max(1, min(MOST_LANES // threads, (64 << 20) // state.shared_bytes))
    with np.errstate(all="ignore"):
        for first in range(0, number, at_once):
            _run(Blocks(program, state, first, min(at_once, number - first)), steps)
    state.memory.finish()


def _run(blocks: Blocks, steps: list[list[Step]]) -> None:
    place = np.zeros(blocks.lanes, np.int32)  # segment; -1 after the exit
    barriers = [segment.barrier for segment in blocks.program.segments]
    while True:
        first = place[0]
        if first >= 0 and (place == first).all():
            chosen, mask = first, None
        else:
            live = np.unique(place[place >= 0])
            if not len(live):
                return
            for chosen in live:
                mask = place == chosen
                if barriers[chosen]:
                    mask = mask & np.repeat(mask.reshape(blocks.count, -1).all(1), blocks.launch.threads)
                if mask.any():
                    break
            else:
                lines = "; ".join(str(barriers[segment]) for segment in live)
                raise Fault(f"a barrier that a part of its block does not reach: {lines}")
        target: np.ndarray | int | None = None
        for step in steps[chosen]:
            target = step(blocks, mask)
        if target is None:
            target = chosen + 1
        if mask is None:
            place = target if isinstance(target, np.ndarray) else np.full(blocks.lanes, target, np.int32)
        else:
            place = np.where(mask, target, place)


def compiled(program: Program) -> list[list[Step]]:
    """Every segment as functions of blocks and mask.

    Raises:
        Unknown: an instruction, by its name.
    """
    return [
        [_step(program, instruction, number) for instruction in segment.instructions]
        for number, segment in enumerate(program.segments)
    ]


# Operands


def _constant(text: str, kind: str) -> np.ndarray:
    text = text.removesuffix("U")
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        bits = np.array(int(match[1], 16), UNSIGNED[len(match[1]) // 2])
        value = bits.view(np.float32 if len(match[1]) == 8 else np.float64)
        return value if TYPES[kind] == value.dtype else bits.view(TYPES[kind])
    size = np.dtype(TYPES[kind]).itemsize
    if TYPES[kind] is np.bool_:
        return np.array(bool(int(text)))
    return np.array(int(text, 0) & (1 << 8 * size) - 1, UNSIGNED[size]).view(TYPES[kind])


def _reader(program: Program, text: str, kind: str) -> Callable[[Blocks], np.ndarray]:
    """An operand as ``kind``."""
    wanted = np.dtype(TYPES[kind])
    if text.startswith("!"):
        read = _reader(program, text[1:], kind)
        return lambda blocks: ~read(blocks)
    if text in program.widths:
        if wanted == np.bool_ or 8 * wanted.itemsize == program.widths[text]:
            return lambda blocks: _register(blocks, text).view(wanted)
        narrow = UNSIGNED[wanted.itemsize]
        return lambda blocks: _register(blocks, text).astype(narrow).view(wanted)
    if text.startswith("%"):
        return lambda blocks: blocks.special[text].astype(wanted)
    if text in program.shared:
        value = np.array(program.shared[text], wanted)
        return lambda blocks: np.full(blocks.lanes, value)
    try:
        value = _constant(text, kind)
    except ValueError:
        raise Unknown(f"operand {text}") from None
    return lambda blocks: np.full(blocks.lanes, value)


def _register(blocks: Blocks, name: str) -> np.ndarray:
    try:
        return blocks.registers[name]
    except KeyError:
        raise Fault(f"register {name} is read before it is written") from None


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")] if text.startswith("{") else [text]


def _address(program: Program, text: str) -> tuple[str, int]:
    """Base and offset in bytes of "[base+offset]"."""
    base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
    return base, int(offset or "0", 0)


# Instructions


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
    if not instruction.predicate:
        return step
    read = _reader(program, instruction.predicate, "pred")
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
    readers = [_reader(program, text, kind) for text, kind in zip(operands, form.operands, strict=True)]
    width, compute = program.widths[destination], form.compute
    bits = np.dtype(_BITS[width])

    def step(blocks: Blocks, mask):
        value = compute(*[read(blocks) for read in readers])
        if value.dtype != bits:
            value = value.view(bits) if value.dtype.itemsize == bits.itemsize else value.astype(bits)
        blocks.put(destination, value, mask)

    return step


def _mov(program: Program, instruction: Instruction) -> Step:
    """``mov`` between a register and a list of narrower ones, the first being the lowest bits."""
    into, source = map(_list, instruction.operands)
    parts, whole = (into, source[0]) if len(into) > 1 else (source, into[0])
    bits = int(instruction.opcode[5:]) // len(parts)
    if len(into) > 1:
        read = _reader(program, whole, f"u{bits * len(parts)}")

        def unpack(blocks: Blocks, mask):
            value = read(blocks)
            for number, name in enumerate(parts):
                if name != "_":
                    blocks.put(name, (value >> value.dtype.type(bits * number)).astype(UNSIGNED[bits // 8]), mask)

        return unpack
    readers = [_reader(program, name, f"u{bits}") for name in parts]
    wide = UNSIGNED[bits * len(parts) // 8]

    def pack(blocks: Blocks, mask):
        value = functools.reduce(
            np.bitwise_or, [read(blocks).astype(wide) << wide(bits * n) for n, read in enumerate(readers)]
        )
        blocks.put(whole, value, mask)

    return pack


def _load(program: Program, instruction: Instruction) -> Step:
    space, kind = re.search(r"\.(param|global|shared)", instruction.opcode)[1], instruction.opcode.rsplit(".", 1)[1]
    names = _list(instruction.operands[0])
    size = np.dtype(TYPES[kind]).itemsize
    base, offset = _address(program, instruction.operands[1])
    if space == "param":
        at = program.parameters[base][0] + offset

        def load_argument(blocks: Blocks, mask):
            data = np.frombuffer(blocks.launch.arguments, np.uint8, size * len(names), at).view(TYPES[kind])
            for name, value in zip(names, data, strict=True):
                blocks.put(name, _widened(np.full(blocks.lanes, value), program, name), mask)

        return load_argument
    read = _reader(program, base, "u64" if space == "global" else "u32")

    def load(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        address = read(blocks)[lanes].astype(np.int64) + offset
        if space == "global":
            blocks_of = blocks.block_of_lane[lanes]
            values = blocks.launch.memory.read(address, size, len(names), blocks_of, instruction)
        else:
            index = blocks.shared.at(lanes, address, size, len(names), instruction)
            values = blocks.shared.read(lanes, index, size, instruction)
        _scatter(blocks, program, names, values.view(TYPES[kind]), lanes, mask)

    return load


def _widened(value: np.ndarray, program: Program, name: str) -> np.ndarray:
    """A loaded value in its register: signed ones are extended by their sign."""
    bits = program.widths[name]
    if np.issubdtype(value.dtype, np.signedinteger):
        value = value.astype(f"i{bits // 8}")
    return value.view(_BITS[bits]) if value.dtype.itemsize * 8 == bits else value.astype(_BITS[bits])


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
    base, offset = _address(program, instruction.operands[0])
    is_global = ".global" in instruction.opcode
    read = _reader(program, base, "u64" if is_global else "u32")
    readers = [_reader(program, name, f"u{8 * size}") for name in _list(instruction.operands[1])]

    def store(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        address = read(blocks)[lanes].astype(np.int64) + offset
        values = np.stack([value(blocks)[lanes] for value in readers], 1)
        if is_global:
            blocks.launch.memory.write(address, values, size, blocks.block_of_lane[lanes], instruction)
        else:
            index = blocks.shared.at(lanes, address, size, len(readers), instruction)
            blocks.shared.write(lanes, index, values, size, instruction)

    return store


def _copy(program: Program, instruction: Instruction) -> Step:
    """``cp.async`` of 4, 8 or 16 bytes, of which the source has ``filled``; the others are zero."""
    (target, source), count = (
        (_address(program, text) for text in instruction.operands[:2]),
        int(instruction.operands[2], 0),
    )
    to, origin = _reader(program, target[0], "u32"), _reader(program, source[0], "u64")
    given = instruction.operands[3:]
    filled = _reader(program, given[0], "u32") if given else lambda blocks: np.full(blocks.lanes, count, np.uint32)

    def copy(blocks: Blocks, mask):
        lanes = blocks.active(mask)
        shared, memory = blocks.shared, blocks.launch.memory
        sizes = filled(blocks)[lanes]
        if not np.isin(sizes, (0, count)).all():
            raise Unknown(f"{instruction}: source sizes of 0 and {count} bytes are known")
        values = np.zeros((len(lanes), count // 4), np.uint32)
        reads = sizes > 0
        address = origin(blocks)[lanes].astype(np.int64) + source[1]
        blocks_of = blocks.block_of_lane[lanes]
        if reads.any():
            values[reads] = memory.read(address[reads], 4, count // 4, blocks_of[reads], instruction)
        index = shared.at(lanes, to(blocks)[lanes].astype(np.int64) + target[1], 4, count // 4, instruction)
        shared.copy(lanes, index, values, 4, instruction)

    return copy


def _commit(program: Program, instruction: Instruction) -> Step:
    return lambda blocks, mask: blocks.shared.commit(blocks.active(mask))


def _wait(program: Program, instruction: Instruction) -> Step:
    open_groups = int(instruction.operands[0], 0) if instruction.operands else 0
    return lambda blocks, mask: blocks.shared.wait(blocks.active(mask), open_groups)


def _barrier(program: Program, instruction: Instruction) -> Step:
    if instruction.operands not in (("0",), ("0x0",)):
        raise Unknown(f"{instruction}: barrier 0 of the whole block is known")

    def barrier(blocks: Blocks, mask):
        whole = np.ones(blocks.count, bool) if mask is None else mask.reshape(blocks.count, -1)[:, 0]
        blocks.shared.barrier(whole)

    return barrier


def _warp_barrier(program: Program, instruction: Instruction) -> Step:
    members = _reader(program, instruction.operands[0], "b32")

    def barrier(blocks: Blocks, mask):
        present = blocks.warps(mask, members(blocks), instruction)
        if not (members(blocks) == 0xFFFFFFFF).all():
            raise Unknown(f"{instruction}: whole warps are known")
        blocks.shared.warp_barrier(slice(None) if present is None else present)

    return barrier


def _shuffle(program: Program, instruction: Instruction) -> Step:
    mode = instruction.opcode.split(".")[2]
    into, predicate = [*instruction.operands[0].split("|"), None][:2]
    value, by, clamp, members = (_reader(program, text, "b32") for text in instruction.operands[1:])

    def shuffle(blocks: Blocks, mask):
        blocks.warps(mask, members(blocks), instruction)
        rows = [read(blocks).reshape(-1, 32) for read in (value, by, clamp)]
        moved, inside = warps.shuffle(mode, *rows)
        blocks.put(into, moved.reshape(-1), mask)
        if predicate:
            blocks.put(predicate, inside.reshape(-1), mask)

    return shuffle


def _reduce(program: Program, instruction: Instruction) -> Step:
    _, _, name, kind = instruction.opcode.split(".")
    reduction = warps.REDUCTIONS[name, kind]
    value, members = (
        _reader(program, text, as_) for text, as_ in zip(instruction.operands[1:], (kind, "b32"), strict=True)
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
    into = _list(instruction.operands[0])
    readers = [[_reader(program, name, "b32") for name in _list(text)] for text in instruction.operands[1:]]

    def multiply(blocks: Blocks, mask):
        blocks.warps(mask, np.full(blocks.lanes, 0xFFFFFFFF, np.uint32), instruction)
        operands = [[read(blocks).reshape(-1, 32) for read in group] for group in readers]
        for name, value in zip(into, warps.multiply(form, *operands), strict=True):
            blocks.put(name, value.reshape(-1), mask)

    return multiply


def _load_matrix(program: Program, instruction: Instruction) -> Step:
    names = _list(instruction.operands[0])
    base, offset = _address(program, instruction.operands[1])
    read, is_transposed = _reader(program, base, "u32"), ".trans" in instruction.opcode
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


def _jump(program: Program, instruction: Instruction) -> Step:
    target = program.labels[instruction.operands[0]]
    return lambda blocks, mask: target


def _exit(program: Program, instruction: Instruction) -> Step:
    return lambda blocks, mask: -1


def _convert_address(program: Program, instruction: Instruction) -> Step:
    into, source = instruction.operands
    read = _reader(program, source, "u64")
    return lambda blocks, mask: blocks.put(into, read(blocks), mask)


_BUILDERS: list[tuple[str, Callable[[Program, Instruction], Step]]] = [
    (r"mov\.b(16|32|64)", _mov),
    (r"ld\.(param|global|shared)(\.v[24])?\.[bsuf](8|16|32|64)", _load),
    (r"st\.(global|shared|shared::cta)(\.v[24])?\.[bsuf](8|16|32|64)", _store),
    (r"cp\.async\.c[ag]\.shared\.global", _copy),
    (r"cp\.async\.commit_group", _commit),
    (r"cp\.async\.wait_(group|all)", _wait),
    (r"bar\.sync", _barrier),
    (r"bar\.warp\.sync", _warp_barrier),
    (r"shfl\.sync\.(up|down|bfly|idx)\.b32", _shuffle),
    (r"redux\.sync\.(add|min|max|and|or|xor)\.[sub]32", _reduce),
    (rf"mma\.sync\.aligned\.({'|'.join(map(re.escape, warps.MATRICES))})", _multiply),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", _load_matrix),
    (r"bra(\.uni)?", _jump),
    (r"ret|exit", _exit),
    (r"cvta\.to\.global\.u64", _convert_address),
]
