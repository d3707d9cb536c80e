"""csrc/cuda by the executor: its host code on CPU tensors, its kernels as nvcc compiles them for sm_80.

The only file here that knows nvcc.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from clipup_kernels.backends import cpp

from . import machine, parser

SOURCES, HOST = Path(__file__).parents[3] / "csrc", "tests/cuda_host.cu"
_RUN = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))


class Address(int):
    """Of a tensor."""

    size = 0
    """Bytes of the tensor."""


def address(tensor: Tensor | None) -> Address:
    """Stands for ``cpp.address``."""
    result = Address(cpp.address(tensor))
    result.size = 0 if tensor is None else tensor.nbytes
    return result


class Library:
    """Stands where the compiled extension has csrc/cuda, and takes ``Address`` for an address."""

    def __init__(self, build: Path) -> None:
        """Compiles into ``build``."""
        path = build / "cuda_host.so"
        wrapped = "-Xlinker=-Bsymbolic,--wrap=__cudaRegisterFunction,--wrap=cudaLaunchKernelExC"
        _nvcc("-shared", "-Xcompiler=-fPIC", wrapped, "--keep", f"--keep-dir={build}", "-o", path, SOURCES / HOST)
        self._call = ctypes.CDLL(str(path)).call
        self._call.restype = ctypes.c_int64
        self.kernels = _kernels((build / "cuda_host.ptx").read_text())
        self.launched: Counter[str] = Counter()
        """Launches by kernel."""

    def __getattr__(self, stage: str):
        return functools.partial(self._called, stage)

    def _called(self, stage: str, *arguments) -> int:
        """Raises what a launch raises, and ValueError for arguments that the stage refuses."""
        extents = [(int(a), a.size, f"argument {n}") for n, a in enumerate(arguments) if isinstance(a, Address)]
        raised: list[BaseException] = []

        def run(kernel: bytes, blocks: int, threads: int, given) -> bool:
            try:
                self._launch(kernel.decode(), blocks, threads, given, extents)
            except BaseException as error:  # no exception passes through C++
                raised.append(error)
            return not raised

        packed = b"".join(struct.pack("<d" if isinstance(a, float) else "<q", a) for a in arguments)
        message = ctypes.create_string_buffer(256)
        result = self._call(stage.encode(), packed, _RUN(run), message)
        if raised:
            raise raised[0]
        if message.value:
            raise ValueError(message.value.decode())
        return result

    def _launch(self, kernel: str, blocks: int, threads: int, given, extents) -> None:
        program, arguments = _parsed(*self.kernels[_plain(kernel)]), bytearray()
        for number, (offset, size) in enumerate(program.parameters.values()):
            arguments += bytes(offset - len(arguments)) + ctypes.string_at(given[number], size)
        self.launched[program.name] += 1
        machine.launch(program, (blocks, 1, 1), threads, bytes(arguments), extents, strict=True)


def kernels_of(files: Sequence[Path], build: Path) -> dict[str, tuple[str, str]]:
    """Those of changed copies of csrc/cuda's files, for ``Library.kernels``."""
    _nvcc("-ptx", f"-I{SOURCES / 'cuda'}", f"--output-directory={build}", *files)
    texts = [(build / file.name).with_suffix(".ptx").read_text() for file in files]
    return {name: kernel for text in texts for name, kernel in _kernels(text).items()}


def _nvcc(*options) -> None:
    subprocess.run(["nvcc", "-std=c++17", "-arch=compute_80", "-lineinfo", *map(str, options)], check=True)


def _kernels(text: str) -> dict[str, tuple[str, str]]:
    """Module and name of every kernel."""
    return {_plain(name): (text, name) for name in re.findall(r"\.entry\s+([\w$]+)", text)}


def _plain(name: str) -> str:
    """Without the name of the file and hashes, by which nvcc tells anonymous namespaces apart."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", name)


_parsed = functools.lru_cache(parser.parse)
