"""Triton's kernels by the executor: on CPU tensors, compiled for an architecture, launched by their own host code.

The only file here that knows Triton.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import triton
from memory_guard import extent
from triton.backends.compiler import GPUTarget

from . import machine, parser
from .hopper import TENSOR_MAP

_FORMATS = {
    "i1": "b",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


_texts: dict[int, str] = {}
"""PTX by the handle of its kernel: Triton loads a kernel once, and keeps the handle."""


class Driver:
    """Stands where Triton has its driver for a card."""

    def __init__(self, arch: int, change: Callable[[str], str] | None) -> None:
        self.arch, self.change = arch, change
        self.launched: Counter[str] = Counter()
        """Launches by kernel."""
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (object(), len(_texts) + 1, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448 if arch == 90 else 166912},
        )

    def launcher_cls(self, source, metadata):
        """What a kernel calls from now on, whichever driver is active then."""
        return lambda *call: triton.runtime.driver.active.launch(source, metadata, *call)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton compiles for a device once

    def get_current_stream(self, device) -> int:
        return 0

    def launch(self, source, metadata, x, y, z, stream, function, options, launched, enter, leave, *given) -> None:
        """Runs a kernel on the tensors that are passed."""
        text = _texts[function]
        program = _parsed(self.change(text) if self.change else text)
        packed, extents, maps = [], [], iter(getattr(metadata, "tensordesc_meta", None) or ())
        for (name, kind), value in zip(source.signature.items(), given, strict=True):
            if kind.startswith("tensordesc"):
                extents.append((value.base.data_ptr(), extent(value.base), name))
                packed.append(_tensor_map(value, next(maps)))
                packed += [struct.pack("<i", size) for size in value.shape]
                packed += [struct.pack("<q", stride) for stride in value.strides]
            elif kind.startswith("*"):
                extents.append((value.data_ptr(), extent(value), name))
                packed.append(struct.pack("<Q", value.data_ptr()))
            elif kind != "constexpr":
                packed.append(struct.pack(f"<{_FORMATS[kind]}", value))
        arguments = bytearray()
        for number, (offset, size) in enumerate(program.parameters.values()):
            arguments.extend(bytes(offset - len(arguments)))
            arguments += packed[number] if number < len(packed) else bytes(size)  # Triton's scratch pointers: null
        self.launched[program.name] += 1
        machine.launch(program, (x, y, z), 32 * metadata.num_warps, bytes(arguments), extents, metadata.shared)


def _tensor_map(given, layout) -> bytes:
    """The argument for a tensor descriptor of Triton's."""
    values = (layout["swizzle"], layout["elem_size"], *given.shape, given.strides[0], *layout["block_size"])
    return TENSOR_MAP.pack(given.base.data_ptr(), *values)


def _loaded(module, function: int, name: str, files: dict[str, str], key: str) -> None:
    _texts[function] = Path(files[f"{name}.ptx"]).read_text()


_parsed = functools.lru_cache(parser.parse)


@contextlib.contextmanager
def executing(arch: int = 80, change: Callable[[str], str] | None = None) -> Iterator[Driver]:
    """Inside, Triton's kernels run on CPU tensors as compiled for ``arch``; ``change`` is applied to their PTX."""
    driver = Driver(arch, change)
    hooks = triton.knobs.runtime
    before = hooks.kernel_load_end_hook
    hooks.kernel_load_end_hook = _loaded
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver.set_active(active)
        hooks.kernel_load_end_hook = before
