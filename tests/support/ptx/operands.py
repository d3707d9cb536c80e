"""Operands of instructions: registers, constants, lists and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import TYPES
from .faults import Fault, Unknown
from .memory import UNSIGNED
from .parser import Program

if TYPE_CHECKING:
    from .machine import Blocks


def constant(text: str, kind: str) -> np.ndarray:
    text = text.removesuffix("U")
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        bits = np.array(int(match[1], 16), UNSIGNED[len(match[1]) // 2])
        value = bits.view(np.float32 if len(match[1]) == 8 else np.float64)
        return value if TYPES[kind] == value.dtype else bits.view(TYPES[kind])
    size = np.dtype(TYPES[kind]).itemsize
    if TYPES[kind] is np.bool_:
        return np.array(bool(int(text)))
    return np.array(int(text, 0) & (1 << 8 * size) - 1, UNSIGNED[size]).view(TYPES[kind])


def reader(program: Program, text: str, kind: str) -> Callable[[Blocks], np.ndarray]:
    """An operand as ``kind``."""
    wanted = np.dtype(TYPES[kind])
    if text.startswith("!"):
        read = reader(program, text[1:], kind)
        return lambda blocks: ~read(blocks)
    if text in program.widths:
        if wanted == np.bool_ or 8 * wanted.itemsize == program.widths[text]:
            return lambda blocks: _register(blocks, text).view(wanted)
        narrow = UNSIGNED[wanted.itemsize]
        return lambda blocks: _register(blocks, text).astype(narrow).view(wanted)
    if text.startswith("%"):
        return lambda blocks: blocks.special[text].astype(wanted)
    symbols = program.shared | {name: offset for name, (offset, _) in program.parameters.items()}
    if text in symbols:
        value = np.array(symbols[text], wanted)
        return lambda blocks: np.full(blocks.lanes, value)
    try:
        value = constant(text, kind)
    except ValueError:
        raise Unknown(f"operand {text}") from None
    return lambda blocks: np.full(blocks.lanes, value)


def _register(blocks: Blocks, name: str) -> np.ndarray:
    try:
        return blocks.registers[name]
    except KeyError:
        raise Fault(f"register {name} is read before it is written") from None


def as_list(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")] if text.startswith("{") else [text]


def address_of(text: str) -> tuple[str, int]:
    """Base and offset in bytes of "[base+offset]"."""
    base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
    return base, int(offset or "0", 0)
