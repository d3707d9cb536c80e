"""Instructions of sm_90: products of warp groups, bulk copies by tensor maps, and the barriers that count their bytes.

Sections of the manual: ``wgmma`` 9.7.15 (fragments and layouts 9.7.15.5.1), ``mbarrier`` 9.7.13, bulk copies of tensors
9.7.9, ``stmatrix`` 9.7.14, proxies 8. A product's results and a copy's bytes are there at once; what the program may
not touch before it has waited for them is remembered, with the line.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import warps
from .arithmetic import bf16_to_f32, tf32
from .faults import Fault, Unknown
from .memory import UNSIGNED
from .operands import address_of, as_list, reader
from .parser import Instruction, Program

if TYPE_CHECKING:
    from .machine import Blocks

GROUP = 128
"""Threads of a warp group."""
_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.(m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.\4)")
TENSOR_MAP = struct.Struct("<QiiQQQii80x")
"""What stands for the driver's 128 bytes of a tensor map of two dimensions: address, swizzle, bytes of an element,
rows, columns, elements from row to row, rows and columns of a box."""


class Product(NamedTuple):
    """A ``wgmma`` in flight."""

    rows: np.ndarray
    """Of its registers, in ``Asynchronous.accessed``."""
    groups: np.ndarray
    numbers: np.ndarray
    """Commits of each group before it."""
    granules: np.ndarray
    """[groups, granules] of shared memory that it reads."""
    instruction: Instruction


class Asynchronous:
    """Products and copies of some blocks that are in flight."""

    def __init__(self, accumulators: int, lanes: int) -> None:
        self.commits = np.zeros(-(-lanes // GROUP), np.int64)
        self.accessed = np.full((accumulators, len(self.commits)), -1, np.int64)
        """[registers, groups]: the line that used it since the last ``wgmma.fence``; 0: none, -1: no fence yet."""
        self.products: list[Product] = []
        self.barriers: dict[tuple[int, int], Barrier] = {}
        """By block and address."""


class Barrier:
    """An ``mbarrier``: arrivals and bytes that its phase still expects."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0
        self.copies: list[tuple[int, np.ndarray]] = []
        """Phase and granules of copies that nothing has waited for."""

    def change(self, arrivals: int, expected: int) -> None:
        self.pending -= arrivals
        self.bytes += expected
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def guarded(program: Program, instruction: Instruction, step: Callable) -> Callable:
    """The step of an instruction that is not ``wgmma``'s, if it names a product's register: it has to come after the
    wait."""
    numbers = program.accumulators
    if not numbers or instruction.opcode.startswith("wgmma"):
        return step
    named = {numbers[name] for name in re.findall(r"%?[\w$]+", " ".join(instruction.operands)) if name in numbers}
    if not named:
        return step
    rows = np.array(sorted(named))

    def touching(blocks: Blocks, mask):
        state, groups = blocks.asynchronous, np.unique(blocks.active(mask) // GROUP)
        _not_in_flight(state.products, rows, groups, instruction)
        state.accessed[np.ix_(rows, groups)] = instruction.line
        return step(blocks, mask)

    return touching


def _not_in_flight(products: list[Product], rows, groups, instruction: Instruction) -> None:
    for product in products:
        if np.isin(rows, product.rows).any() and np.isin(groups, product.groups).any():
            raise Fault(f"{instruction}: a register of a product that has not been waited for: {product.instruction}")


def _groups(blocks: Blocks, mask, instruction: Instruction, threads: int = GROUP) -> np.ndarray:
    """Numbers of the active groups of ``threads``, which have to be whole."""
    present = (blocks.lane >= 0 if mask is None else mask).reshape(-1, threads)
    if blocks.launch.threads % threads or (present.any(1) & ~present.all(1)).any():
        if threads == GROUP:
            raise Fault(f"{instruction}: executed by a part of the warp group only")
        raise Unknown(f"{instruction}: known only where all threads of a block execute it")
    return np.flatnonzero(present[:, 0])


def _whole(blocks: Blocks, mask, instruction: Instruction) -> np.ndarray:
    """Numbers of the active blocks."""
    return _groups(blocks, mask, instruction, blocks.launch.threads)


def _swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Bits of 16 bytes, changed by the number of the row of 128 bytes; ``width``: 16-byte units of a row, 1 is none."""
    return addresses ^ (addresses >> 3 & (width - 1) * 16)


@functools.lru_cache(maxsize=256)
def _places(by_k: bool, rows: int, depth: int, size: int, width: int, leading: int, stride: int) -> np.ndarray:
    """Bytes [rows, depth] from the start of a matrix to its elements, before the swizzle (9.7.15.5.1.2).

    Args:
        by_k: neighbors in memory are those along K (K-major), not along M or N.
        width: 16-byte units of a swizzled row; 1: no swizzle.
    """
    row, term = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    inner, outer = (term, row) if by_k else (row, term)
    unit, within = inner // (16 // size), inner % (16 // size) * size
    if width > 1:
        inside = unit % width * 16 + outer % 8 * width * 16 + within
        return inside + outer // 8 * stride + unit // width * (0 if by_k else leading)
    by_unit, by_eight = (leading, stride) if by_k else (stride, leading)
    return outer % 8 * 16 + within + unit * by_unit + outer // 8 * by_eight


def _matrix(blocks: Blocks, descriptors, by_k, rows: int, depth: int, kind: str, groups, instruction):
    """A matrix [groups, rows, depth] in float32 that descriptors describe, and its granules."""
    given = descriptors.reshape(-1, GROUP)[groups].astype(np.int64)
    fields = np.unique(given >> 16)  # all but the start
    if (given != given[:, :1]).any():
        raise Fault(f"{instruction}: threads of a warp group give different matrix descriptors")
    if len(fields) != 1 or fields[0] >> 33 & 7:
        raise Unknown(f"{instruction}: one layout of matrices, and a base offset of 0, is known")
    leading, stride, mode = (
        (int(fields[0]) & 0x3FFF) << 4,
        (int(fields[0]) >> 16 & 0x3FFF) << 4,
        int(fields[0]) >> 46 & 3,
    )
    width, size = (1, 8, 4, 2)[mode], 4 if kind == "tf32" else 2
    if width > 1 and by_k and depth * size > 16 * width:
        raise Unknown(f"{instruction}: {depth} terms in a row of {16 * width} bytes")
    places = _places(by_k, rows, depth, size, width, leading, stride)
    addresses = _swizzled((given[:, 0] & 0x3FFF)[:, None] * 16 + places.reshape(1, -1), width)
    shared, lanes = blocks.shared, groups * GROUP
    index = shared.at(np.repeat(lanes, places.size), addresses.reshape(-1), size, 1, instruction)
    index = index.reshape(len(groups), -1)
    granules = shared.read_by_async_proxy(lanes, index, size, instruction)
    bits = shared.views[size][index].reshape(len(groups), rows, depth)
    if kind == "tf32":
        return tf32(bits.view(np.float32)), granules
    return (bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)), granules


def _product(program: Program, instruction: Instruction) -> Callable:
    """``wgmma.mma_async`` of two matrices in shared memory. Products are summed in float32, in numpy's order."""
    _, columns, depth, kind = _PRODUCT.fullmatch(instruction.opcode).groups()
    columns, depth = int(columns), int(depth)
    names = as_list(instruction.operands[0])
    left, right, added, *signs = instruction.operands[1:]
    if left.startswith("{") or signs[:2] != ["1", "1"] or len(names) != columns // 2:
        raise Unknown(f"{instruction}: matrices in shared memory, without a sign, are known")
    left, right, added = reader(program, left, "u64"), reader(program, right, "u64"), reader(program, added, "pred")
    by_k = [sign == "0" for sign in signs[2:]] or [True, True]
    rows = np.array([program.accumulators[name] for name in names])

    def multiply(blocks: Blocks, mask):
        state, groups = blocks.asynchronous, _groups(blocks, mask, instruction)
        followed = [  # all but those of the same shape and registers, which follow each other
            product for product in state.products
            if product.instruction.opcode != instruction.opcode or not np.array_equal(rows, product.rows)
        ]  # fmt: skip
        _not_in_flight(followed, rows, groups, instruction)
        touched = state.accessed[np.ix_(rows, groups)]
        if touched.any():
            line = int(touched[touched != 0][0])
            other = next(
                (str(found) for found in program.instructions if found.line == line), "the start of the kernel"
            )
            raise Fault(f"{instruction}: no wgmma.fence after its registers were used: {other}")
        a, read = _matrix(blocks, left(blocks), by_k[0], 64, depth, kind, groups, instruction)
        b, also = _matrix(blocks, right(blocks), by_k[1], columns, depth, kind, groups, instruction)
        granules = np.concatenate([read, also], 1)
        state.products.append(Product(rows, groups, state.commits[groups], granules, instruction))
        np.add.at(blocks.shared.reading, granules, 1)  # the warp groups of a block share a matrix
        total = np.matmul(a, b.transpose(0, 2, 1)).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        fragments = np.zeros((len(names), len(state.commits), GROUP), np.float32)
        fragments[:, groups] = total.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(names), -1, GROUP)
        fragments = fragments.reshape(len(names), -1)
        adds = added(blocks)
        for name, values in zip(names, fragments, strict=True):
            if adds.any():
                values = values + np.where(adds, reader(program, name, "f32")(blocks), np.float32(0))
            blocks.put(name, values.view(np.uint32), mask)

    return multiply


def _fence_registers(program: Program, instruction: Instruction) -> Callable:
    def fence(blocks: Blocks, mask):
        blocks.asynchronous.accessed[:, _groups(blocks, mask, instruction)] = 0

    return fence


def _commit(program: Program, instruction: Instruction) -> Callable:
    def commit(blocks: Blocks, mask):
        blocks.asynchronous.commits[_groups(blocks, mask, instruction)] += 1

    return commit


def _wait(program: Program, instruction: Instruction) -> Callable:
    open_groups = int(instruction.operands[0], 0)

    def wait(blocks: Blocks, mask):
        state, waiting, left = blocks.asynchronous, _groups(blocks, mask, instruction), []
        for product in state.products:
            done = np.isin(product.groups, waiting)
            done &= product.numbers < state.commits[product.groups] - open_groups
            blocks.shared.finish_reads(product.groups[done] * GROUP, product.granules[done], product.instruction)
            if not done.all():
                rows, groups, numbers, granules, line = product
                left.append(Product(rows, groups[~done], numbers[~done], granules[~done], line))
        state.products = left

    return wait


def _fence_proxies(program: Program, instruction: Instruction) -> Callable:
    return lambda blocks, mask: blocks.shared.fence_proxies(_whole(blocks, mask, instruction))


def _elect(program: Program, instruction: Instruction) -> Callable:
    into, predicate = instruction.operands[0].split("|")
    if instruction.operands[1] != "-1":
        raise Unknown(f"{instruction}: whole warps are known")

    def elect(blocks: Blocks, mask):
        blocks.warps(mask, np.full(blocks.lanes, 0xFFFFFFFF, np.uint32), instruction)
        blocks.put(into, np.zeros(blocks.lanes, np.uint32), mask)
        blocks.put(predicate, blocks.special["%laneid"] == 0, mask)

    return elect


def _store_matrix(program: Program, instruction: Instruction) -> Callable:
    base, offset = address_of(instruction.operands[0])
    read = reader(program, base, "u32")
    values = [reader(program, name, "b32") for name in as_list(instruction.operands[1])]

    def store_matrix(blocks: Blocks, mask):
        blocks.warps(mask, np.full(blocks.lanes, 0xFFFFFFFF, np.uint32), instruction)
        addresses = read(blocks).astype(np.int64).reshape(-1, 32) + offset
        lanes, shared = blocks.active(mask), blocks.shared
        for number, value in enumerate(values):
            at = warps.matrix_rows(addresses, number)
            if (at.reshape(-1)[lanes] % 16).any():
                raise Fault(f"{instruction}: a row's address is not a multiple of 16")
            index = shared.at(lanes, (at + warps.MEMBER * 4).reshape(-1)[lanes], 4, 1, instruction)
            shared.write(lanes, index, value(blocks)[lanes][:, None], 4, instruction)

    return store_matrix


def _barrier(program: Program, instruction: Instruction) -> Callable:
    """``init``, ``inval`` and ``arrive.expect_tx`` of an ``mbarrier``: its 8 bytes race as if stored and loaded."""
    action = instruction.opcode.split(".")[1]
    place = instruction.operands[1 if action == "arrive" else 0]
    base, offset = address_of(place)
    read = reader(program, base, "u32")
    given = reader(program, instruction.operands[-1], "u32") if action != "inval" else None

    def barrier(blocks: Blocks, mask):
        lanes, shared, barriers = blocks.active(mask), blocks.shared, blocks.asynchronous.barriers
        addresses = read(blocks)[lanes].astype(np.int64) + offset
        index = shared.at(lanes, addresses, 8, 1, instruction)
        if action == "arrive":
            shared.read(lanes, index, 8, instruction)
        else:
            shared.write(lanes, index, np.zeros((len(lanes), 1), np.uint64), 8, instruction)
        for lane, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            where = (lane // blocks.launch.threads, address)
            if action == "init":
                barriers[where] = Barrier(int(given(blocks)[lane]))
            elif action == "inval":
                _known(barriers, where, instruction)
                del barriers[where]
            else:
                _known(barriers, where, instruction).change(1, int(given(blocks)[lane]))

    return barrier


def _known(barriers: dict[tuple[int, int], Barrier], where: tuple[int, int], instruction: Instruction) -> Barrier:
    if where not in barriers:
        raise Fault(f"{instruction}: no mbarrier was initialized at address {where[1]}")
    return barriers[where]


def _wait_for_phase(program: Program, instruction: Instruction) -> Callable:
    """``mbarrier.try_wait.parity``, by all threads of a block, so that none is left to arrive: it may not fail."""
    base, offset = address_of(instruction.operands[1])
    read, parity = reader(program, base, "u32"), reader(program, instruction.operands[2], "u32")

    def wait(blocks: Blocks, mask):
        state, shared, lanes = blocks.asynchronous, blocks.shared, blocks.active(mask)
        addresses = read(blocks).astype(np.int64) + offset
        shared.read(lanes, shared.at(lanes, addresses[lanes], 8, 1, instruction), 8, instruction)
        parities = parity(blocks)
        for block in _whole(blocks, mask, instruction).tolist():
            own = slice(block * blocks.launch.threads, (block + 1) * blocks.launch.threads)
            if len(np.unique(addresses[own])) > 1 or len(np.unique(parities[own])) > 1:
                raise Unknown(f"{instruction}: a block whose threads wait for different phases")
            barrier = _known(state.barriers, (block, int(addresses[own][0])), instruction)
            if barrier.phase & 1 == int(parities[own][0]):
                raise Fault(
                    f"{instruction}: waits without end: phase {barrier.phase} lacks {barrier.pending} arrivals and"
                    f" {barrier.bytes} bytes"
                )
            for _, granules in (copy for copy in barrier.copies if copy[0] < barrier.phase):
                shared.pending[granules] = False
                shared.writer[granules] = 0  # every thread of the block has waited
            barrier.copies = [copy for copy in barrier.copies if copy[0] >= barrier.phase]
        blocks.put(instruction.operands[0], np.ones(blocks.lanes, bool), mask)

    return wait


def _load_box(program: Program, instruction: Instruction) -> Callable:
    """``cp.async.bulk.tensor.2d``: a box of a tensor map, zeros outside of its tensor."""
    base, offset = address_of(instruction.operands[0])
    tensor_map, *coordinates = re.fullmatch(r"\[(\S+), *\{(\S+), *(\S+)\}\]", instruction.operands[1]).groups()
    to, origin = reader(program, base, "u32"), reader(program, tensor_map, "u64")
    column, row = (reader(program, name, "s32") for name in coordinates)
    barrier_base, barrier_offset = address_of(instruction.operands[2])
    barrier_at = reader(program, barrier_base, "u32")

    def load_box(blocks: Blocks, mask):
        state, shared, memory = blocks.asynchronous, blocks.shared, blocks.launch.memory
        for lane in blocks.active(mask):
            at = int(origin(blocks)[lane])
            start, swizzle, size, rows, columns, stride, *box = TENSOR_MAP.unpack_from(blocks.launch.arguments, at)
            y, x = (index.reshape(-1) for index in np.indices(box))
            target = int(to(blocks)[lane]) + offset + (y * box[1] + x) * size
            y, x = y + int(row(blocks)[lane]), x + int(column(blocks)[lane])
            inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
            values = np.zeros((len(y), 1), UNSIGNED[size])
            sources = start + (y[inside].astype(np.int64) * stride + x[inside]) * size
            owners = blocks.owners(np.full(len(sources), lane))
            values[inside] = memory.read(sources, size, 1, owners, instruction)
            if (target[0] % 128) or box[1] * size % 16:
                raise Fault(f"{instruction}: a box at {target[0]} in rows of {box[1] * size} bytes is not aligned")
            lanes = np.full(len(y), lane)
            index = shared.at(lanes, _swizzled(target, (1, 2, 4, 8)[swizzle]), size, 1, instruction)
            where = (lane // blocks.launch.threads, int(barrier_at(blocks)[lane]) + barrier_offset)
            barrier = _known(state.barriers, where, instruction)
            granules = shared.write_by_async_proxy(lanes, index, values, size, instruction)
            barrier.copies.append((barrier.phase, granules))
            barrier.change(0, -values.nbytes)

    return load_box


BUILDERS: list[tuple[str, Callable[[Program, Instruction], Callable]]] = [
    (_PRODUCT.pattern, _product),
    (r"wgmma\.fence\.sync\.aligned", _fence_registers),
    (r"wgmma\.commit_group\.sync\.aligned", _commit),
    (r"wgmma\.wait_group\.sync\.aligned", _wait),
    (r"fence\.proxy\.async\.shared(::cta)?", _fence_proxies),
    (r"elect\.sync", _elect),
    (r"stmatrix\.sync\.aligned\.m8n8\.x[124]\.shared\.b16", _store_matrix),
    (r"mbarrier\.(init|inval|arrive\.expect_tx)\.shared(::cta)?\.b64", _barrier),
    (r"mbarrier\.try_wait\.parity\.shared(::cta)?\.b64", _wait_for_phase),
    (r"cp\.async\.bulk\.tensor\.2d\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes", _load_box),
]
