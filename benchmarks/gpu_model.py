"""Predicted time of every launch of the fused op on an H100, from its FLOPs and its bytes; no GPU is needed.

    python benchmarks/gpu_model.py                       the kernels as they are, at 50,000 tokens
    python benchmarks/gpu_model.py --tokens 4096 --l2 5.5

A product's tile takes the longer of two times: its FLOPs on the tensor cores, and its bytes through the second-level
cache, operands, results and what its epilogue reads. The last wave of tiles counts as full, and a launch takes at least
as long as its bytes from memory. Routing and the sum of x's two gradients are included. Left out are instructions,
which products hide, the start of a block, waiting at barriers, the clock under load and the host.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from clipup_kernels.triton import configs

MULTIPROCESSORS, CLOCK = 132, 1.7e9
TENSOR_FLOPS = 4096
"""Per cycle and multiprocessor, dense, 16 bits (H100 SXM datasheet: 989 TFLOP/s at 1.83 GHz)."""
SHARED_BYTES, LAUNCH, DRAM_BYTES = 227 * 1024, 3e-6, 2.6e12
CUBLAS_FLOPS = 650e12
"""Of dense_k's products in torch. ``gpu_kernels.py`` measures them ("torch, in" and "torch, out")."""


class Product(NamedTuple):
    """A launch that multiplies; R rows of D or H."""

    name: str
    depth: float
    """Terms of a sum."""
    outputs: tuple[float, float]
    """Rows and columns of the output; tiles of rows may be part full at the end of every expert."""
    parts: int
    """Experts at whose ends tiles of rows are part full."""
    dram_bytes: float
    epilogue_bytes: int = 2
    """Bytes that the epilogue reads and writes for each output."""


def products(rows: float, width: int, hidden: int, experts: int, training: bool) -> Iterator[Product]:
    """The products of a forward pass, or of both, in bfloat16."""
    weight = 2 * experts * width * hidden
    narrow, wide = 2 * rows * width, 2 * rows * hidden
    written = 2 if training else 1
    yield Product("project_in", width, (rows, hidden), experts, narrow + weight + written * wide, 2 * written)
    yield Product("project_rows", hidden, (rows, width), experts, wide + weight + narrow)
    if training:
        yield Product("project_back", width, (rows, hidden), experts, narrow + weight + 3 * wide, 6)
        both_weights = 2 * experts * hidden, width
        yield Product("expert_gradients", rows / experts, both_weights, 0, 2 * (narrow + wide + weight))
        yield Product("project_rows, dx", hidden, (rows, width), experts, wide + weight + narrow)


class Prediction(NamedTuple):
    """Milliseconds of a launch: what bounds it, each alone, and the whole."""

    tensor: float
    l2: float
    dram: float
    total: float
    waves: float
    blocks: int
    """Blocks that share a multiprocessor."""


def predict(product: Product, l2_bytes: float) -> Prediction:
    """The model of the file's first lines."""
    kernel = product.name.partition(",")[0]
    tile = configs.heuristic(90, kernel, "half", "many", 768, 3072)
    block_m, block_n, block_k = tile[:3]
    tiles = (product.outputs[0] / block_m + product.parts / 2) * (product.outputs[1] / block_n)
    blocks = min(2, SHARED_BYTES // (2 * (block_m + block_n) * block_k * tile.num_stages))
    tensor = 2 * block_m * block_n * product.depth / TENSOR_FLOPS
    through_l2 = 2 * (block_m + block_n) * product.depth + product.epilogue_bytes * block_m * block_n
    l2 = through_l2 / (l2_bytes / MULTIPROCESSORS / CLOCK)
    waves = tiles / (MULTIPROCESSORS * blocks)
    in_all = tiles / MULTIPROCESSORS / CLOCK * 1e3
    dram = product.dram_bytes / DRAM_BYTES * 1e3
    total = max(-(-waves // 1) * blocks * max(tensor, l2) / CLOCK * 1e3, dram) + LAUNCH * 1e3
    return Prediction(tensor * in_all, l2 * in_all, dram, total, waves, blocks)


class Move(NamedTuple):
    """An op without products on tensor cores, or torch's."""

    name: str
    bytes: float
    launches: int = 1

    @property
    def milliseconds(self) -> float:
        return 1e3 * (self.bytes / DRAM_BYTES + self.launches * LAUNCH)


def moves(rows: float, width: int, hidden: int, experts: int, tokens: float, training: bool) -> Iterator[Move]:
    """Routing, and the launches that only move rows."""
    token_rows, logits = 2 * tokens * width, 4 * tokens * experts
    yield Move("router_logits", token_rows + logits)
    yield Move("topk_gating", logits + 8 * rows + 4 * tokens, 2)
    yield Move("dispatch", 16 * rows, 3)
    yield Move("combine", 2 * rows * width + token_rows)
    if training:
        yield Move("gate_gradient", 4 * rows * hidden / 128 + token_rows)
        yield Move("gather_sum", 2 * rows * width + token_rows)
        yield Move("topk_gating_backward", 2 * logits + 8 * rows + 4 * tokens)
        yield Move("router_logits_backward", 2 * token_rows + 2 * logits + 8 * 2048 * width, 3)
        yield Move("sum of x's gradients", 3 * token_rows)


def dense(rows: float, width: int, hidden: int, training: bool, cublas_flops: float = CUBLAS_FLOPS) -> float:
    """Milliseconds of a dense MLP on as many rows in torch: products at cuBLAS's rate, and passes over memory for the
    activation, its slope, and the sums that are the biases' gradients."""
    flops = (3 if training else 1) * 4 * rows * width * hidden
    passes = (2 + (3 if training else 0)) * 2 * rows * hidden + (2 * rows * (hidden + width) if training else 0)
    return 1e3 * (flops / cublas_flops + passes / DRAM_BYTES)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 50_000), ("width", 768), ("hidden", 3072), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--l2", type=float, default=7.5, help="TB/s of the second-level cache (default 7.5)")
    parser.add_argument("--cublas", type=float, default=650, help="TFLOP/s of dense_k's products (default 650)")
    options = parser.parse_args(argv)
    rows = options.tokens * options.top_k
    layer = rows, options.width, options.hidden
    print(f"{'launch':22} {'blocks':>6} {'waves':>6} {'tensor':>7} {'L2':>7} {'memory':>7} {'ms':>7}")
    for training in (False, True):
        total = 0.0
        for product in products(*layer, options.experts, training):
            found = predict(product, options.l2 * 1e12)
            total += found.total
            times = (found.tensor, found.l2, found.dram, found.total)
            print(f"{product.name:22} {found.blocks:6} {found.waves:6.1f} " + " ".join(f"{ms:7.2f}" for ms in times))
        for move in moves(*layer, options.experts, options.tokens, training):
            total += move.milliseconds
            print(f"{move.name:22} {'':29} {move.milliseconds:7.2f} {move.milliseconds:7.2f}")
        peer = dense(*layer, training, options.cublas * 1e12)
        what = "forward + backward" if training else "forward"
        print(f"{what:22} {total:44.2f}, {total / peer:.2f} of dense_k ({peer:.2f} ms at cuBLAS's rate)\n")


if __name__ == "__main__":
    main()
