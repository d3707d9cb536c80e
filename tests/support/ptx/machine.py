"""A launch: the threads of several blocks run in lockstep, and by a mask where they diverge.

Of the segments that threads have reached, the first in the text runs next, so diverged threads reconverge where their
paths join. A barrier waits until all threads of its block have arrived.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .faults import Fault, Unknown
from .hopper import Asynchronous
from .instructions import Step, compiled
from .memory import Global, Shared
from .parser import Instruction, Program

MOST_LANES = 8192
"""Threads that run together."""
_CODE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


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
        self.asynchronous = Asynchronous(len(program.accumulators), self.lanes)
        self.shared = Shared(count, launch.shared_bytes, threads, launch.granule, launch.memory.strict)

    def put(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        before = self.registers.get(name)
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,)).copy()
        self.registers[name] = value if mask is None or before is None else np.where(mask, value, before)

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        """Numbers of the active threads."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def owners(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of threads, and their stamps."""
        return self.block_of_lane[lanes], self.shared.stamp(lanes)

    def warps(self, mask: np.ndarray | None, members: np.ndarray, instruction: Instruction) -> np.ndarray | None:
        """The active warps, None for all. A thread has to be in its member mask, and all threads in it active."""
        if mask is None and (members == 0xFFFFFFFF).all():
            return None
        present, lane = np.ones((self.lanes // 32, 32), bool), np.arange(32, dtype=np.uint32)
        if mask is not None:
            present = mask.reshape(-1, 32)
        members = members.reshape(-1, 32)
        active = (present << lane).sum(1, dtype=np.uint32)[:, None]
        if (present & (members & ~active != 0)).any():
            raise Fault(f"{instruction}: executed by a part of the warp only")
        if (present & (members >> lane & 1 == 0)).any():
            raise Fault(f"{instruction}: executed by a thread that is not in its mask")
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
        memory.granule = min([2, *(_element_bytes(i) for i in program.instructions if ".global" in i.opcode)])


def _element_bytes(instruction: Instruction) -> int:
    match = re.search(r"\.[bsuf](8|16|32|64)$", instruction.opcode)
    return _CODE_BYTES[match[1]] if match else 4


def launch(
    program: Program, grid: tuple[int, int, int], threads: int, arguments: bytes,
    extents: Sequence[tuple[int, int, str]], shared_bytes: int = 0, strict: bool = False,
) -> None:  # fmt: skip
    """Runs a kernel on memory of this process.

    Args:
        arguments: the parameters, laid out as ``program.parameters``.
        extents: address, bytes and name of every tensor that the kernel may touch.
        shared_bytes: dynamic shared memory.
        strict: threads that write equal values to one address, and numbers that do not fit an integer, are faults too.

    Raises:
        Fault: what the GPU leaves undefined. Unknown: an instruction that the executor does not have.
    """
    steps = compiled(program)
    state = Launch(program, grid, threads, arguments, Global(list(extents), strict), shared_bytes)
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
