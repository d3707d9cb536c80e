"""The fastest matrix product measured on this machine; a layer's rate is given as a share of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import clock

import clipup_kernels as ck

SHAPES = ((2048, 2048, 2048), (1024, 768, 3072), (1024, 3072, 768))
"""Rows, inputs and outputs of the products: a large one, and an MLP's two on rows that stay in the caches."""
GPU_SHAPES = ((8192, 8192, 8192), (65536, 768, 3072), (65536, 3072, 768))
"""The same on a GPU, which smaller ones do not fill."""
INT8_SHAPES = ((512, 4096, 8192), (512, 2048, 8192))
"""Of packed int8 products. A call quantizes its rows, which takes little time beside many outputs."""
ROUNDS = 2


def products(dtype: torch.dtype, device: str) -> Iterator[tuple[float, Callable[[], object]]]:
    """Operations (2 a multiply-add) and call of every product: torch's mm, then ``grouped_linear`` with one expert."""
    generator = torch.Generator(device).manual_seed(0)
    for rows, inputs, outputs in SHAPES if device == "cpu" else GPU_SHAPES:
        x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
        weight = torch.randn(1, outputs, inputs, generator=generator, device=device).to(dtype)
        offsets = torch.tensor([0, rows], dtype=torch.int32, device=device)
        transposed = weight[0].mT.contiguous()
        flops = 2.0 * rows * inputs * outputs
        yield flops, lambda x=x, w=transposed: torch.mm(x, w)
        yield flops, lambda x=x, w=weight, offsets=offsets: ck.grouped_linear(x, w, None, offsets)


def int8_products() -> Iterator[tuple[float, Callable[[], object]]]:
    """The same of ``grouped_linear`` with packed int8 weights on a CPU, rows and results in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in INT8_SHAPES:
        x = torch.randn(rows, inputs, generator=generator).bfloat16()
        weight = ck.pack_weight(torch.randn(1, outputs, inputs, generator=generator).bfloat16(), "int8")
        offsets = torch.tensor([0, rows], dtype=torch.int32)
        yield 2.0 * rows * inputs * outputs, partial(ck.grouped_linear, x, weight, None, offsets)


class GemmPeak:
    """The best rate so far of each (dtype, threads), in TFLOP/s."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.best: dict[tuple[str, int], float] = {}

    @torch.no_grad()
    def measure(self, dtype: str, torch_dtype: torch.dtype, threads: int) -> None:
        """Runs all products in turn, ``ROUNDS`` times; raises the best rate when one is faster."""
        calls = [*products(torch_dtype, self.device)]
        rates = [flops / clock(run, self.device) / 1e12 for _ in range(ROUNDS) for flops, run in calls]
        self.best[dtype, threads] = max(rates + [self.best.get((dtype, threads), 0.0)])

    def share(self, row: dict) -> float:
        """A row's rate as a share of the peak of its type and threads; 1 is the peak."""
        return float(row["tflops"]) / self.best[row["dtype"], row["threads"]]
