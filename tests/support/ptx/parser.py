"""PTX text as segments of instructions: no jump leads into a segment, and none leaves it but at its end."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace

from .faults import Unknown

WIDTHS = {".pred": 0, ".b8": 8, ".b16": 16, ".b32": 32, ".b64": 64, ".u8": 8, ".s8": 8, ".u16": 16, ".s16": 16}
WIDTHS |= {".u32": 32, ".s32": 32, ".f32": 32, ".u64": 64, ".s64": 64, ".f64": 64, ".f16": 16, ".bf16": 16}
_LABEL = re.compile(r"([$\w]+):(?!:)")
_PREDICATE = re.compile(r"@(!?)(%?[\w$]+)\s+")
_OPERAND = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|[^,\s][^,]*")
_REGISTERS = re.compile(r"(%?[\w$]+)<(\d+)>|(%?[\w$]+)")
_ARRAY = re.compile(
    r"(?:\.extern|\.visible|\.weak)?\s*\.(shared|global|const|local)\s*(?:\.align\s+(\d+))?\s*(\.\w+)\s+"
    r"([\w$]+)\s*(\[(\d*)\])?"
)
_PARAMETER = re.compile(
    r"\.param\s*(?:\.align\s+(\d+)\s*)?(\.\w+)\s*(?:\.ptr[\s.\w]*?\.align\s+\d+\s+)?([\w$]+)\s*(?:\[(\d+)\])?\s*$"
)


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``, and where it stands."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    line: int
    """In the PTX, from 1."""
    source: str
    """The place in the kernel's source that the compiler gives, for example "rows.py:45"; or ""."""

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        place = f" ({self.source})" if self.source else ""
        operands = ", ".join(text if len(text) < 60 else f"{text[:20]} ... {text[-10:]}" for text in self.operands)
        return f"line {self.line}{place}: {guard}{self.opcode} {operands}"


@dataclass
class Segment:
    """Instructions that run one after the other. The last may be a jump or an exit; a barrier is always the first."""

    instructions: list[Instruction] = field(default_factory=list)

    @property
    def barrier(self) -> Instruction | None:
        first = self.instructions[0] if self.instructions else None
        return first if first and first.opcode == "bar.sync" else None


@dataclass(eq=False)
class Program:
    """One kernel."""

    name: str
    widths: dict[str, int]
    """Bits of every register; 0 is a predicate."""
    parameters: dict[str, tuple[int, int]]
    """Offset and size of every parameter in the buffer of arguments."""
    shared: dict[str, int]
    """Offsets of the arrays in shared memory; an array without a size is last."""
    shared_bytes: int
    segments: list[Segment]
    labels: dict[str, int]
    """Segments by their label."""

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for segment in self.segments for instruction in segment.instructions]

    @functools.cached_property
    def accumulators(self) -> dict[str, int]:
        """Registers that products of warp groups write, numbered."""
        products = [found.operands[0] for found in self.instructions if found.opcode.startswith("wgmma.mma_async")]
        return {name: number for number, name in enumerate(dict.fromkeys(re.findall(r"%?[$\w]+", " ".join(products))))}


def _statements(text: str, files: dict[str, str]):
    """Statements with their line and source; labels and scopes are statements of their own.

    The source is the innermost place that is not in a header of CUDA.
    """
    source, pending, start = "", "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"//.*", "", raw).strip()
        if line.startswith((".loc", ".file")):
            places = [(files[file], int(at)) for file, at in re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", line)]
            source = next((f"{name}:{at}" for name, at in places if at and not name.endswith(".hpp")), source)
            continue
        while line:
            if not pending:
                start = number
                if match := _LABEL.match(line):
                    yield "label", match[1], start, source
                    line = line[match.end() :].lstrip()
                    continue
                if line[0] in "{}":
                    yield "scope", line[0], start, source
                    line = line[1:].lstrip()
                    continue
            head, semicolon, rest = line.partition(";")
            pending += f" {head}" if pending else head
            if not semicolon:
                break
            yield "statement", pending.strip(), start, source
            pending, line = "", rest.strip()


def _instruction(text: str, line: int, source: str) -> Instruction:
    match = _PREDICATE.match(text)
    if match:
        text = text[match.end() :]
    opcode, _, rest = text.partition(" ")
    opcode, _, tab = opcode.partition("\t")
    operands = tuple(part.strip() for part in _OPERAND.findall(f"{tab} {rest}"))
    return Instruction(opcode, operands, match[2] if match else None, bool(match and match[1]), line, source)


def _declared(text: str, widths: dict[str, int]) -> None:
    kind, names = text[len(".reg") :].split(None, 1)
    for name, count, single in _REGISTERS.findall(names):
        for register in [f"{name}{number}" for number in range(int(count))] if name else [single]:
            widths[register] = WIDTHS[kind]


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def parse(text: str, kernel: str | None = None) -> Program:
    """A kernel of a PTX module, by default its only one.

    Raises:
        Unknown: several kernels and none is named, functions that are called, or a directive that is not known.
    """
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", text))
    wanted = [entry for entry in entries if kernel in (None, entry[1])]
    if len(wanted) != 1 or re.search(r"^\s*\.func\b", text, re.MULTILINE):
        raise Unknown(f"{len(wanted)} kernels in the module, 1 is known, and no functions")
    (entry,) = wanted
    name, arguments = entry.groups()
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    parameters, offset = {}, 0
    for declared in filter(str.strip, arguments.split(",")):
        match = _PARAMETER.match(declared.strip())
        if not match:
            raise Unknown(f"parameter {declared.strip()}")
        unit = WIDTHS[match[2]] // 8
        offset = _aligned(offset, int(match[1] or unit))
        size = unit * int(match[4] or 1)
        parameters[match[3]] = (offset, size)
        offset += size
    begin = entry.end()
    body = "\n" * text.count("\n", 0, begin) + text[begin : _end(text, begin)]
    widths, arrays = {}, _ARRAY.findall(text[: entries[0].start()])
    segments, labels, scopes = [Segment()], {}, [{}]
    for kind, statement, line, source in _statements(body, files):
        last = segments[-1].instructions
        if kind == "label":
            if last:
                segments.append(Segment())
            scopes[-1][statement] = statement if len(scopes) == 1 else f"{statement} of line {line}"
            labels[scopes[-1][statement]] = len(segments) - 1
        elif kind == "scope":
            scopes = [*scopes, {}] if statement == "{" else scopes[:-1]
        elif kind == "statement" and statement.startswith(".reg"):
            _declared(statement, widths)
        elif kind == "statement" and _ARRAY.match(statement):
            arrays += _ARRAY.findall(statement)
        elif kind == "statement" and not statement.startswith("."):
            instruction = _instruction(statement, line, source)
            if instruction.operands and instruction.operands[0] in scopes[-1]:
                instruction = replace(instruction, operands=(scopes[-1][instruction.operands[0]],))
            if last and (last[-1].opcode.split(".")[0] in ("bra", "ret", "exit") or instruction.opcode == "bar.sync"):
                segments.append(Segment())
            segments[-1].instructions.append(instruction)
        elif kind == "statement" and not statement.startswith(".pragma"):
            raise Unknown(f"line {line}: {statement}")
    shared, size = {}, 0
    for space, align, element, symbol, brackets, length in sorted(arrays, key=lambda array: array[4] == "[]"):
        if space == "shared":
            size = _aligned(size, int(align or 4))
            shared[symbol] = size
            size += WIDTHS[element] // 8 * (int(length or 0) if brackets else 1)
        elif space in ("local", "const"):
            raise Unknown(f"{space} memory: {symbol}")
    return Program(name, widths, parameters, shared, size, segments, labels)


def _end(text: str, begin: int) -> int:
    depth = 1
    for match in re.finditer(r"//[^\n]*|[{}]", text[begin:]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return begin + match.start()
    raise Unknown("a kernel without an end")
