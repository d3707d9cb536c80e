"""Predicted time of every launch of the fused op on an H100, from its machine code and its bytes; no GPU is needed.

    python benchmarks/gpu_model.py                       the kernels as they are, at 50,000 tokens
    python benchmarks/gpu_model.py --tokens 4096 --l2 5.5

Kernels are compiled for sm_90 by the installed Triton. A product's tile takes the longest of three times: its FLOPs on
the tensor cores, its instructions in the four schedulers of a multiprocessor, and its bytes through the second-level
cache, operands, results and what its epilogue reads. A tile's epilogue overlaps the products of another one if two
blocks share a multiprocessor, and is added if they do not. The last wave of tiles counts as full, and a launch takes at
least as long as its bytes from memory. Routing and the sum of x's two gradients are included. Left out are the start of
a block, waiting at barriers, the clock under load and the host.

    python benchmarks/gpu_model.py --tile 128 256 64 8 3    project_in and project_back with another tile
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NamedTuple

from gpu_static import all_variants

from clipup_kernels.triton import configs, variants

MULTIPROCESSORS, CLOCK = 132, 1.7e9
TENSOR_FLOPS = 4096
"""Per cycle and multiprocessor, dense, 16 bits (H100 SXM datasheet: 989 TFLOP/s at 1.83 GHz)."""
SCHEDULERS, REGISTERS, SHARED_BYTES, LAUNCH = 4, 65536, 227 * 1024, 3e-6
DRAM_BYTES = 2.6e12
CUBLAS_FLOPS = 650e12
"""Of dense_k's products in torch. ``gpu_kernels.py`` measures them ("torch, in" and "torch, out")."""


class Code(NamedTuple):
    """A kernel's machine code."""

    registers: int
    shared_bytes: int
    step: int
    """Instructions per thread of one step over the terms."""
    after: int
    """Instructions per thread after the last product of a tile; those of a loop there are counted once."""
    again: int
    """Those of the loop among them, 0 without one."""


class Product(NamedTuple):
    """A launch that multiplies; R rows of D or H."""

    name: str
    variant: str
    """The compiled kernel's name."""
    depth: float
    """Terms of a sum."""
    outputs: tuple[float, float]
    """Rows and columns of the output; tiles of rows may be part full at the end of every expert."""
    parts: int
    """Experts at whose ends tiles of rows are part full."""
    dram_bytes: float
    epilogue_bytes: int = 2
    """Bytes that the epilogue reads and writes for each output."""
    turns: int = 1
    """Of the loop in its epilogue, if it has one."""


def code_of(name: str, tile: configs.Config | None) -> tuple[Code, dict[str, int], int]:
    """The machine code of a variant for sm_90, its tile and its warps; ``tile`` is taken instead of the variant's."""
    (variant,) = (one for one in all_variants(90) if one.name == name)
    if tile is not None:
        variant = variant._replace(constants=variant.constants | tile.constants, options=tile.options)
    compiled = variants.compile_variant(variant, 90)
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", compiled.sass)
    position = {int(address, 16): number for number, (address, _) in enumerate(found)}
    texts = [text for _, text in found]
    loops, others = [], {}
    for number, text in enumerate(texts):
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        begin = position.get(int(jump[1], 16), number) if jump else number
        if begin < number and any("HGMMA" in inside for inside in texts[begin:number]):
            loops.append((number - begin + 1, number))
        elif begin < number:
            others[begin] = number - begin + 1
    step, end = min(loops)
    last = max(number for number, text in enumerate(texts) if "HGMMA" in text)
    done = max(last, end)
    again = sum(length for begin, length in others.items() if begin > done and length > 1)  # not the trap at the end
    code = Code(compiled.registers, compiled.shared_bytes, step, len(texts) - done, again)
    return code, variant.constants, variant.options["num_warps"]


def products(rows: float, width: int, hidden: int, experts: int, training: bool) -> Iterator[Product]:
    """The products of a forward pass, or of both, in bfloat16."""
    weight = 2 * experts * width * hidden
    narrow, wide = 2 * rows * width, 2 * rows * hidden
    form = "gelu" if training else "inference"
    yield Product(
        "project_in", f"project_in {form} bf16 half 128x128x64 w8", width, (rows, hidden), experts,
        narrow + weight + wide * (2 if training else 1), 4 if training else 2,
    )  # fmt: skip
    yield Product(
        "project_rows", "project_rows forward bf16 half 128x256x64 w8", hidden, (rows, width), experts,
        wide + weight + narrow,
    )  # fmt: skip
    if not training:
        return
    yield Product(
        "project_back", "project_back gelu bf16 half 128x128x64 w8", width, (rows, hidden), experts,
        narrow + weight + 3 * wide, 6, turns=2,
    )  # fmt: skip
    yield Product(
        "expert_gradients", "expert_gradients plain bf16 half 128x256x64 w8", rows / experts,
        (2 * experts * hidden, width), 0, 2 * (narrow + wide + weight),
    )  # fmt: skip
    yield Product(
        "project_rows, dx", "project_rows gradient bf16 half 128x256x64 w8", hidden, (rows, width), experts,
        wide + weight + narrow,
    )  # fmt: skip


class Prediction(NamedTuple):
    """Milliseconds of a launch: what bounds it, each alone, and the whole."""

    tensor: float
    issue: float
    l2: float
    dram: float
    total: float
    waves: float
    blocks: int
    """Blocks that share a multiprocessor."""


def predict(product: Product, l2_bytes: float, other_tile: configs.Config | None) -> Prediction:
    """The model of the file's first lines."""
    code, tile, warps = code_of(product.variant, other_tile if product.name in ("project_in", "project_back") else None)
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    tiles = (product.outputs[0] / block_m + product.parts / 2) * (product.outputs[1] / block_n)
    steps = product.depth / block_k
    by_registers = REGISTERS // (32 * warps * -(-code.registers // 8) * 8)
    blocks = max(1, min(2, by_registers, SHARED_BYTES // (code.shared_bytes + 1024)))
    tensor = 2 * block_m * block_n * block_k * steps / TENSOR_FLOPS
    issue = code.step * steps * warps / SCHEDULERS
    epilogue = (code.after + (product.turns - 1) * code.again) * warps / SCHEDULERS
    through_l2 = 2 * (block_m + block_n) * block_k * steps + product.epilogue_bytes * block_m * block_n
    l2 = through_l2 / (l2_bytes / MULTIPROCESSORS / CLOCK)
    waves = tiles / (MULTIPROCESSORS * blocks)
    cycles = blocks * max(tensor, issue + epilogue, l2) if blocks > 1 else max(tensor, issue, l2) + epilogue
    in_all = tiles / MULTIPROCESSORS / CLOCK * 1e3
    dram = product.dram_bytes / DRAM_BYTES * 1e3
    total = max(-(-waves // 1) * cycles / CLOCK * 1e3, dram) + LAUNCH * 1e3
    return Prediction(tensor * in_all, (issue + epilogue) * in_all, l2 * in_all, dram, total, waves, blocks)


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
    tile = ("M", "N", "K", "WARPS", "STAGES")
    parser.add_argument("--tile", type=int, nargs=5, metavar=tile, help="of project_in and project_back")
    options = parser.parse_args(argv)
    rows = options.tokens * options.top_k
    layer = rows, options.width, options.hidden
    print(f"{'launch':22} {'blocks':>6} {'waves':>6} {'tensor':>7} {'issue':>7} {'L2':>7} {'memory':>7} {'ms':>7}")
    for training in (False, True):
        total = 0.0
        for product in products(*layer, options.experts, training):
            found = predict(product, options.l2 * 1e12, options.tile and configs.Config(*options.tile))
            total += found.total
            times = (found.tensor, found.issue, found.l2, found.dram, found.total)
            print(f"{product.name:22} {found.blocks:6} {found.waves:6.1f} " + " ".join(f"{ms:7.2f}" for ms in times))
        for move in moves(*layer, options.experts, options.tokens, training):
            total += move.milliseconds
            print(f"{move.name:22} {'':37} {move.milliseconds:7.2f} {move.milliseconds:7.2f}")
        peer = dense(*layer, training, options.cublas * 1e12)
        what = "forward + backward" if training else "forward"
        print(f"{what:22} {total:52.2f}, {total / peer:.2f} of dense_k ({peer:.2f} ms at cuBLAS's rate)\n")


if __name__ == "__main__":
    main()
