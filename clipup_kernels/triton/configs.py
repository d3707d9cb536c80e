"""Tile sizes, warps and pipeline stages of the grouped products: looked up, never timed while a model runs.

The key is the architecture, the kernel, how float32 is multiplied, the average number of rows per expert, and the sizes
of the weights. Cases that ``python -m clipup_kernels.triton.tune`` has measured come from its table, all others from
the heuristic below. The table is a JSON file: the path in CLIPUP_TRITON_CONFIGS, or ``clipup/triton_configs.json`` in
the user's cache directory.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..user_cache import user_cache, write_json
from .launch import FUSED, power_of_two

TABLE_PATH = "CLIPUP_TRITON_CONFIGS"
"""Environment variable: the file that ``tune`` writes, read when the first product is launched."""

KERNELS = (
    "project_in", "project_in_gated", "project_rows", "project_rows_transposed", "project_back", "weight_gradient",
    "expert_gradients",
)  # fmt: skip
GRADIENTS = ("weight_gradient", "expert_gradients")
"""Those that sum over the experts' rows: no weights are read."""
LONG_EPILOGUES = ("project_in", "project_in_gated", "project_back")
"""Those that apply activations to their sums."""
BUCKETS = {"few": 96, "some": 768, "many": float("inf")}
"""Classes of rows per expert, with their upper limits."""


class Config(NamedTuple):
    """The tile of a grouped product: a block computes ``block_m x block_n`` outputs, ``block_k`` terms at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Weights are loaded by descriptors (TMA, architecture 90 and later) instead of ``cp.async``."""

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def even(self, depth: int, columns: int) -> dict[str, bool]:
        """Whether the sizes are multiples of the tile's, so that loads need no masks."""
        return {"EVEN_DEPTH": depth % self.block_k == 0, "EVEN_COLUMNS": columns % self.block_n == 0}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **FUSED}


# By architecture (100 has the tiles of 90) and arithmetic: the tile of products with a long epilogue (activations), and
# that of the others. A long epilogue takes about as long as the products of a tile. With 8 warps, 128 registers per
# thread and up to 113 KB, two blocks share a multiprocessor, and one block's epilogue overlaps the other's products.
# Architecture 80 stays within the 99 KB of the consumer variants (8.6, 8.9, 12.0) of the data-center architectures.
_TILES = {
    (80, "half"): (Config(128, 128, 32, 8, 4), Config(128, 128, 32, 8, 4)),
    (90, "half"): (Config(128, 128, 64, 8, 3), Config(128, 256, 64, 8, 3)),
    (80, "tf32"): (Config(64, 64, 32, 4, 3), Config(128, 128, 16, 8, 3)),
    (90, "tf32"): (Config(64, 64, 32, 4, 3), Config(128, 128, 32, 8, 3)),
    (80, "ieee"): (Config(64, 64, 16, 8, 2), Config(64, 64, 16, 8, 2)),
    (90, "ieee"): (Config(64, 64, 16, 8, 2), Config(64, 64, 16, 8, 2)),
}


def architecture(device: torch.device) -> int:
    """The architecture of a device in the table: 80, 90 or 100. The interpreter, on CPU tensors, uses 90."""
    if device.type == "cpu":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def arithmetic(dtype: torch.dtype) -> str:
    """How ``dtype`` is multiplied: "half" for 16 bits; float32 by "tf32" if torch allows it in matmuls, else "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``, which 16-bit types ignore."""
    return "tf32" if arithmetic(dtype) == "tf32" else "ieee"


def bucket_of(num_rows: int, num_experts: int) -> str:
    """The class of rows per expert."""
    return next(name for name, most in BUCKETS.items() if num_rows <= most * num_experts)


def heuristic(arch: int, kernel: str, kind: str, bucket: str, depth: int, columns: int) -> Config:
    """A tile for products of ``depth`` terms that yield ``columns`` columns."""
    fused, plain = _TILES[min(arch, 90), kind]
    tile = fused if kernel in LONG_EPILOGUES else plain
    if depth % 16 or columns % 16:  # unaligned rows are loaded element by element, through registers
        tile = Config(64, 32, 32, 4, 2) if kind != "ieee" else tile
    if kernel == "project_in_gated":  # two sums of products instead of one
        tile = tile._replace(block_n=tile.block_n // 2)
    if tile.block_n == 256 and (columns % 256 or bucket != "many"):  # no half-empty tiles, and enough of them
        tile = tile._replace(block_n=128, num_warps=4)
    tile = tile._replace(block_n=min(tile.block_n, _tile_side(columns)))
    if kernel in GRADIENTS:  # they sum over the experts' rows
        return tile._replace(num_stages=max(3, tile.num_stages))
    if bucket == "few" and tile.block_m > 64:
        tile = tile._replace(block_m=64, num_warps=4)
    return tile._replace(block_k=min(tile.block_k, _tile_side(depth)))


class Case(NamedTuple):
    """A kernel with one of its tiles."""

    arch: int
    kernel: str
    dtype: torch.dtype
    kind: str
    config: Config
    is_main: bool
    """Many rows per expert in bfloat16: the one case per kernel for which its rarer forms are also compiled."""
    even: bool
    """Whether the weights' sizes are multiples of the tile's; if not, they are not multiples of 16 either."""

    @property
    def most_registers(self) -> int | None:
        """65,536 over the threads of two blocks, for the tiles of ``_TILES`` that count on a second block."""
        fused = _TILES[min(self.arch, 90), self.kind][0]
        two = self.arch == 90 and self.kind == "half" and self.kernel in LONG_EPILOGUES
        same = self.config.block_m == fused.block_m and self.config.num_warps == fused.num_warps
        return 65_536 // (2 * 32 * fused.num_warps) if two and same else None


def cases(arch: int, kernel: str) -> Iterator[Case]:
    """Every tile that the heuristic gives a kernel on an architecture, for weights with at least 128 columns.

    The main one also with weights by descriptors on architecture 90, because ``tune`` may choose them.
    """

    def tiles(depth: int, widths: tuple[int, ...]) -> list[Config]:
        sizes = [(bucket, columns) for bucket in reversed(BUCKETS) for columns in widths]
        return list(dict.fromkeys(heuristic(arch, kernel, kind, bucket, depth, columns) for bucket, columns in sizes))

    for kind, dtypes in {
        "half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,), "ieee": (torch.float32,),
    }.items():  # fmt: skip
        for dtype in dtypes:
            for number, tile in enumerate(tiles(768, (3072, 640))):
                is_main = number == 0 and dtype == torch.bfloat16
                yield Case(arch, kernel, dtype, kind, tile, is_main, even=True)
                if is_main and arch == 90 and kernel not in GRADIENTS:
                    yield Case(arch, kernel, dtype, kind, tile._replace(descriptors=True), False, even=True)
            for tile in tiles(767, (3071,)):
                yield Case(arch, kernel, dtype, kind, tile, False, even=False)


def choose(
    kernel: str, device: torch.device, dtype: torch.dtype, num_rows: int, num_experts: int, depth: int, columns: int
) -> Config:
    """The config of a launch: from the measured table, else from the heuristic.

    Args:
        kernel: one of ``KERNELS``.
        num_rows: R. depth, columns: terms and columns of the product; for ``weight_gradient``, which sums over rows,
            the rows and columns of a weight.
    """
    bucket = bucket_of(num_rows, num_experts)
    return _choose(architecture(device), kernel, arithmetic(dtype), bucket, depth, columns)


@functools.cache
def _choose(arch: int, kernel: str, kind: str, bucket: str, depth: int, columns: int) -> Config:
    measured = table().get(entry_name(arch, kernel, kind, bucket, depth, columns))
    return measured or heuristic(arch, kernel, kind, bucket, depth, columns)


def entry_name(arch: int, kernel: str, kind: str, bucket: str, depth: int, columns: int) -> str:
    """A case's name in the table."""
    return f"sm{arch} {kernel} {kind} {bucket} {depth}x{columns}"


def table_path() -> Path:
    """Path of the measured table, which need not exist unless CLIPUP_TRITON_CONFIGS names it."""
    return Path(os.environ.get(TABLE_PATH) or user_cache("triton_configs.json"))


@functools.cache
def table() -> dict[str, Config]:
    """The measured configs by ``entry_name``; empty before ``tune``.

    Raises:
        FileNotFoundError: CLIPUP_TRITON_CONFIGS names a file that does not exist.
    """
    try:
        text = table_path().read_text()
    except (OSError, RuntimeError):  # also a home directory that is another user's, or none
        if os.environ.get(TABLE_PATH):
            raise
        return {}
    return {name: Config(*values) for name, values in json.loads(text).items()}


def store(measured: dict[str, Config]) -> Path:
    """Adds configs to the table's file and returns its path; later launches use them."""
    path = table_path()
    write_json(path, (table() if path.exists() else {}) | measured)
    forget()
    return path


def forget() -> None:
    """Makes the next launch read the table's file again."""
    table.cache_clear()
    _choose.cache_clear()


def _tile_side(size: int) -> int:
    """The smallest power of two that is at least ``size`` and 16, the least that a tensor core takes."""
    return max(16, power_of_two(size))
