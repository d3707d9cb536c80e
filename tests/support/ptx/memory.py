"""Memory of a launch, with who wrote and read what: the memory model's races are found when they happen."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .parser import Instruction

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
MANY = 0xFFFFFFFF
"""Threads of several warps; the largest of all stamps since a barrier of the block."""
_WARP = 0x8000
"""Added to a warp's number: several of its threads."""


class Global:
    """The tensors of a launch, at their addresses in this process."""

    def __init__(self, extents: list[tuple[int, int, str]], strict: bool) -> None:
        """``extents``: address, bytes and name of every tensor."""
        self.strict = strict
        self.granule = 2
        extents = _joined(sorted(extent for extent in extents if extent[1]))
        self.starts = np.array([start for start, _, _ in extents] or [0], np.int64)
        self.ends = np.array([start + size for start, size, _ in extents] or [0], np.int64)
        self.names = [name for _, _, name in extents]
        self.base = int(self.starts[0]) & ~15
        span = int(self.ends.max()) - self.base + 16
        self.views = {size: _at(self.base, span // size, kind) for size, kind in UNSIGNED.items()}
        self.writers = [np.full(end - start, -1, np.int32) for start, end in zip(self.starts, self.ends, strict=True)]
        self.stamps = [np.zeros(len(writers), np.int64) for writers in self.writers]
        self.written_by: dict[int, dict[int, Instruction]] = {}
        self.reads: list[tuple[int, np.ndarray, tuple[np.ndarray, np.ndarray], Instruction]] = []

    def at(self, addresses: np.ndarray, size: int, count: int, instruction: Instruction) -> np.ndarray:
        """Indices into ``views[size]``, [threads, count], of addresses that each hold ``count`` values."""
        addresses = addresses.astype(np.int64)
        tensor = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (tensor >= 0) & (addresses + size * count <= self.ends[tensor])
        if not inside.all():
            far = addresses[~inside][0]
            near = int(np.abs(self.starts - far).argmin())
            name = self.names[near] if self.names else "none"
            raise Fault(
                f"{instruction}: address outside of every tensor, {far - self.starts[near]:+} from the start of {name}"
                f" ({self.ends[near] - self.starts[near]} bytes), in {int((~inside).sum())} threads"
            )
        if (addresses % (size * count)).any():
            raise Fault(f"{instruction}: an address is not a multiple of {size * count}")
        return ((addresses - self.base) // size)[:, None] + np.arange(count)

    def read(self, addresses, size: int, count: int, owners, instruction: Instruction) -> np.ndarray:
        """Values [threads, count]; ``owners`` are the blocks and the stamps of the threads."""
        index = self.at(addresses, size, count, instruction)
        addresses, anywhere = addresses.astype(np.int64), np.ones(len(addresses), bool)
        for number, of_tensor, offsets in self._places(addresses, size * count, self.written_by):
            self._check_order(number, offsets, [part[of_tensor] for part in owners], anywhere[of_tensor], instruction)
        self.reads.append((size * count, addresses, owners, instruction))
        return self.views[size][index]

    def write(self, addresses, values: np.ndarray, size: int, owners, instruction: Instruction) -> None:
        """``values``: [threads, count]."""
        index, addresses = self.at(addresses, size, values.shape[1], instruction), addresses.astype(np.int64)
        differs = (self.views[size][index] != values).any(1) | self.strict
        self.views[size][index] = values
        if (self.views[size][index] != values).any():
            raise Fault(f"{instruction}: threads write different values to one global address")
        for number, of_tensor, offsets in self._places(addresses, size * values.shape[1], range(len(self.starts))):
            blocks, stamps = (part[of_tensor] for part in owners)
            own, before = blocks[:, None], self.writers[number][offsets]
            self._check_order(number, offsets, (blocks, stamps), differs[of_tensor], instruction)
            self.writers[number][offsets], self.stamps[number][offsets] = own, stamps
            if ((before >= 0) & (before != own)).any() or (self.writers[number][offsets] != own).any():
                raise Fault(f"{instruction}: two blocks write one address of {self.names[number]}")
            if self.strict and (self.stamps[number][offsets] != stamps).any():
                raise Fault(f"{instruction}: threads write equal values to one address of {self.names[number]}")
            self.written_by.setdefault(number, {})[instruction.line] = instruction

    def _places(self, addresses, size: int, numbers):
        """For every tensor of ``numbers``: which addresses it has, and their offsets in steps of ``granule`` bytes."""
        tensor = np.searchsorted(self.starts, addresses, "right") - 1
        for number in numbers:
            of_tensor = tensor == number
            if of_tensor.any():
                steps = np.arange(0, size, self.granule)
                yield number, of_tensor, (addresses[of_tensor] - self.starts[number])[:, None] + steps

    def _check_order(self, number: int, offsets, owners, where, instruction: Instruction) -> None:
        """No other thread of the block has written there since the last barrier."""
        blocks, stamps = owners
        inside = (self.writers[number][offsets] == blocks[:, None]) & where[:, None]
        if (inside & clashing(self.stamps[number][offsets], stamps)).any():
            lines = "; ".join(str(write) for write in self.written_by[number].values())
            raise Fault(f"{instruction}: no barrier after another thread's write to {self.names[number]}: {lines}")

    def finish(self) -> None:
        """After a launch: no block has read what another has written, and barriers are between reads and writes."""
        for size, addresses, owners, instruction in self.reads:
            for number, of_tensor, offsets in self._places(addresses, size, self.written_by):
                blocks, stamps = (part[of_tensor] for part in owners)
                writer, written = self.writers[number][offsets], self.stamps[number][offsets]
                inside, what = writer == blocks[:, None], ""
                if ((writer >= 0) & ~inside).any():
                    what = "reads what another block of the launch writes"
                elif (inside & clashing(written, stamps) & clashing(stamps, written)).any():
                    what = "no barrier before another thread's write"
                if what:
                    lines = "; ".join(str(write) for write in self.written_by[number].values())
                    raise Fault(f"{instruction}: {what}: {lines}")


def _joined(extents: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Sorted extents, those that overlap as one."""
    joined: list[tuple[int, int, str]] = []
    for start, size, name in extents:
        if joined and start < joined[-1][0] + joined[-1][1]:
            first, length, names = joined[-1]
            joined[-1] = (first, max(length, start + size - first), f"{names} and {name}")
        else:
            joined.append((start, size, name))
    return joined


class _Address:
    def __init__(self, address: int, length: int, kind: type) -> None:
        self.__array_interface__ = {
            "data": (address, False), "shape": (length,), "typestr": np.dtype(kind).str, "version": 3
        }  # fmt: skip


def _at(address: int, length: int, kind: type) -> np.ndarray:
    """Memory of this process; only what ``Global.at`` allows is touched."""
    return np.asarray(_Address(address, length, kind))


def clashing(stamps: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Where a stamp is of another thread that no barrier orders before ``own``."""
    code = stamps & 0xFFFF
    same = (stamps >> 32 == own >> 32) & (code != own & 0xFFFF)
    if not same.any():
        return same
    warp = np.where(code & _WARP, np.where(code == 0xFFFF, -1, code & 0x7FFF), code >> 5)
    ordered = (warp == (own & 0xFFFF) >> 5) & (stamps >> 16 & 0xFFFF < own >> 16 & 0xFFFF)
    return same & ~ordered


class Shared:
    """Shared memory of ``blocks`` blocks, and per granule the threads that wrote and read it since the last barrier.

    A stamp is (barriers of the block so far) << 32 | (barriers of the warp) << 16 | thread.
    """

    def __init__(self, blocks: int, size: int, threads: int, granule: int, strict: bool) -> None:
        self.size, self.threads, self.granule, self.strict = -(-size // 16) * 16, threads, granule, strict
        data = np.full(blocks * self.size, 0xA5, np.uint8)
        self.views = {width: data.view(kind) for width, kind in UNSIGNED.items()}
        number = blocks * self.size // granule
        self.writer, self.reader, self.adder = (np.zeros(number, np.int64) for _ in range(3))
        self.write_line, self.read_line, self.add_line = (np.zeros(number, np.int32) for _ in range(3))
        self.written, self.pending = np.zeros(number, bool), np.zeros(number, bool)
        self.unfenced = np.zeros(number, bool)  # written by instructions that are not the async proxy's
        self.reading = np.zeros(number, np.int16)  # products in flight that read it
        self.barriers = np.ones(blocks, np.int64)
        self.warp_barriers = np.zeros(-(-blocks * threads // 32), np.int64)
        self.commits = np.zeros(blocks * threads, np.int64)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.instructions: dict[int, Instruction] = {}

    def at(self, lanes, addresses, size: int, count: int, instruction: Instruction) -> np.ndarray:
        """Indices into ``views[size]``, [threads, count]; ``lanes`` are the threads' numbers in all blocks."""
        addresses = addresses.astype(np.int64)
        outside = (addresses < 0) | (addresses + size * count > self.size)
        if outside.any():
            raise Fault(f"{instruction}: address {addresses[outside][0]} of {self.size} bytes of shared memory")
        if (addresses % (size * count)).any():
            raise Fault(f"{instruction}: an address is not a multiple of {size * count}")
        return ((addresses + lanes // self.threads * self.size) // size)[:, None] + np.arange(count)

    def _granules(self, index: np.ndarray, size: int) -> np.ndarray:
        if size <= self.granule:
            return index * size // self.granule
        per = size // self.granule
        return (index[:, :, None] * per + np.arange(per)).reshape(len(index), -1)

    def stamp(self, lanes) -> np.ndarray:
        thread, block = lanes % self.threads, lanes // self.threads
        return (self.barriers[block] << 32 | self.warp_barriers[lanes // 32] << 16 | thread)[:, None]

    def _race(self, where, lines, granules, lanes, instruction: Instruction, what: str) -> None:
        thread = lanes[where.any(1)][0]
        other = self.instructions[int(lines[granules[where][0]])]
        raise Fault(
            f"race in shared memory: thread {thread % self.threads} at {instruction}, and {what} by another at {other}"
        )

    def read(self, lanes, index, size: int, instruction: Instruction) -> np.ndarray:
        """Values at ``index``, which is ``at``'s or of the same form."""
        granules, own = self._granules(index, size), self.stamp(lanes)
        self._check_value(granules, instruction)
        self._check(granules, own, lanes, instruction, written=True, added=True)
        self._join(self.reader, granules, own)
        self.read_line[granules] = instruction.line
        return self.views[size][index]

    def add(self, lanes, index, values, size: int, instruction: Instruction) -> None:
        """Atomic additions: they do not race each other."""
        granules, own = self._granules(index, size), self.stamp(lanes)
        self._check_value(granules, instruction)
        self._check(granules, own, lanes, instruction, written=True, read=True)
        self._join(self.adder, granules, own)
        self.add_line[granules] = instruction.line
        np.add.at(self.views[size], index, values)

    def _check_value(self, granules, instruction: Instruction) -> None:
        self.instructions[instruction.line] = instruction
        pending = self.pending[granules]
        if pending.any():
            other = self._line(pending, self.write_line, granules)
            raise Fault(f"{instruction}: reads what has not been waited for: {other}")
        if not self.written[granules].all():
            raise Fault(f"{instruction}: reads shared memory that was never written")

    def _check(self, granules, own, lanes, instruction: Instruction, *, written=False, read=False, added=False) -> None:
        """No other thread has done this since the last barrier."""
        kinds = (
            (written, self.writer, self.write_line, "written"), (read, self.reader, self.read_line, "read"),
            (added, self.adder, self.add_line, "added to"),
        )  # fmt: skip
        for checked, stamps, lines, what in kinds:
            if checked and (clash := clashing(stamps[granules], own)).any():
                self._race(clash, lines, granules, lanes, instruction, what)

    def _join(self, stamps, granules, own) -> None:
        """Adds threads to those since the last barrier."""
        merged = self._merged(stamps[granules], own)
        stamps[granules] = merged
        several = stamps[granules] != merged
        if several.any():
            where = granules[several]
            np.maximum.at(stamps, where, self._merged(stamps[where], np.broadcast_to(own, granules.shape)[several]))

    def _line(self, where, lines, granules) -> Instruction:
        return self.instructions[int(lines[granules[where][0]])]

    def _fenced(self, granules, instruction: Instruction) -> None:
        unfenced = self.unfenced[granules]
        if unfenced.any():
            other = self._line(unfenced, self.write_line, granules)
            raise Fault(f"{instruction}: no fence.proxy.async after the write of {other}")

    def read_by_async_proxy(self, lanes, index, size: int, instruction: Instruction) -> np.ndarray:
        """The granules that products begin to read; ``lanes``: the first thread of each warp group."""
        granules = self._granules(index, size)
        self.instructions[instruction.line] = instruction
        self._check_value(granules, instruction)
        self._check(granules, self.stamp(lanes) | MANY, lanes, instruction, written=True, added=True)
        self._fenced(granules, instruction)
        self.read_line[granules] = instruction.line
        return granules

    def finish_reads(self, lanes, granules, instruction: Instruction) -> None:
        """The products of the threads' warp groups have read ``granules``."""
        np.add.at(self.reading, granules, -1)
        self.reader[granules] = self.stamp(lanes) | MANY
        self.read_line[granules] = instruction.line

    def write_by_async_proxy(self, lanes, index, values, size: int, instruction: Instruction) -> np.ndarray:
        granules = self._granules(index, size)
        self._fenced(granules, instruction)
        self.write(lanes, index, values, size, instruction)
        self.unfenced[granules], self.pending[granules] = False, True
        return granules

    def fence_proxies(self, blocks) -> None:
        self.unfenced.reshape(len(self.barriers), -1)[blocks] = False

    def _merged(self, stamps, own) -> np.ndarray:
        """The stamp of all readers since the last barrier, ``own`` included."""
        code = stamps & 0xFFFF
        fresh = (stamps >> 32 != own >> 32) | (code == own & 0xFFFF)
        if fresh.all():
            return np.broadcast_to(own, stamps.shape)
        warp = np.where(code & _WARP, np.where(code == 0xFFFF, -1, code & 0x7FFF), code >> 5)
        own_warp = (own & 0xFFFF) >> 5
        ordered = (warp == own_warp) & (stamps >> 16 & 0xFFFF < own >> 16 & 0xFFFF)
        joint = np.where(warp == own_warp, _WARP | own_warp, MANY)
        return np.where(fresh | ordered, own, own & ~0xFFFF | joint)

    def _mark(self, lanes, granules, instruction: Instruction) -> None:
        own = self.stamp(lanes)
        self.instructions[instruction.line] = instruction
        pending, reading = self.pending[granules], self.reading[granules] > 0
        if pending.any():
            other = self._line(pending, self.write_line, granules)
            raise Fault(f"{instruction}: writes where {other} is still writing")
        if reading.any():
            raise Fault(f"{instruction}: writes where {self._line(reading, self.read_line, granules)} is still reading")
        self._check(granules, own, lanes, instruction, written=True, read=True, added=True)
        self.writer[granules] = own
        self.write_line[granules] = instruction.line
        self.written[granules] = self.unfenced[granules] = True

    def write(self, lanes, index, values, size: int, instruction: Instruction) -> np.ndarray:
        """Writes ``values`` [threads, count]; returns the granules."""
        granules = self._granules(index, size)
        self._mark(lanes, granules, instruction)
        self.views[size][index] = values
        differ = (self.views[size][index] != values).any()
        if differ or self.strict and (self.writer[granules] != self.stamp(lanes)).any():
            kind = "different" if differ else "equal"
            raise Fault(f"race in shared memory: threads write {kind} values to one address at {instruction}")
        return granules

    def copy(self, lanes, index, values, size: int, instruction: Instruction) -> None:
        """``cp.async``: writes from now until the thread waits for its group."""
        granules = self.write(lanes, index, values, size, instruction)
        self.pending[granules] = True
        self.copies.append((lanes, self.commits[lanes], granules))

    def commit(self, lanes) -> None:
        self.commits[lanes] += 1

    def wait(self, lanes, open_groups: int) -> None:
        """Completes all but the last ``open_groups`` groups of the threads."""
        waiting = np.zeros(len(self.commits), bool)
        waiting[lanes] = True
        left = []
        for owners, groups, granules in self.copies:
            done = waiting[owners] & (groups < self.commits[owners] - open_groups)
            if done.any():
                self.pending[granules[done]], self.unfenced[granules[done]] = False, True
                self.writer[granules[done]] = self.stamp(owners[done])
            if not done.all():
                left.append((owners[~done], groups[~done], granules[~done]))
        self.copies = left

    def barrier(self, blocks) -> None:
        self.barriers[blocks] += 1

    def warp_barrier(self, warps) -> None:
        self.warp_barriers[warps] += 1
