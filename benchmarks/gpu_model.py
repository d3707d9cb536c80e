"""Predicted time of every launch of the fused op on an H100, from its FLOPs and its bytes; no GPU is needed.

    python benchmarks/gpu_model.py                       the kernels as they are, at 50,000 tokens
    python benchmarks/gpu_model.py --tokens 4096 --l2 5.5

A product's tile takes the longest of three times: its FLOPs on the tensor cores, its bytes through shared memory
(operands are written once, and read by every warpgroup that multiplies them), and its bytes through the second-level
cache: operands, results and what its epilogue reads. A block that has its multiprocessor alone starts with a wait for
its first operands. The last wave of tiles counts as full, and a launch takes at least as long as its bytes from memory.
Routing and the sum of x's two gradients are included. Left out are instructions, which products hide, waiting at
barriers, the clock under load and the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from harness import number, parser

from clipup_kernels.triton import configs

MULTIPROCESSORS, CLOCK = 132, 1.7e9
TENSOR_FLOPS = 4096
"""Per cycle and multiprocessor, dense, 16 bits (H100 SXM datasheet: 989 TFLOP/s at 1.83 GHz)."""
SHARED_BYTES, SHARED_RATE = 227 * 1024, 128
"""Of a multiprocessor; the rate in bytes per cycle."""
START = 1500
"""Cycles from a block's start to its first product: offsets, then choices, then operands, one wait after the other."""
LAUNCH, DRAM_BYTES = 3e-6, 2.6e12


class Launch(NamedTuple):
    """A launch of either pass, or those of an op together; R rows of D or H."""

    name: str
    bytes: float
    """From and to memory."""
    depth: float = 0
    """Terms of a sum on the tensor cores; 0: only moves rows."""
    outputs: tuple[float, float] = (0, 0)
    """Rows and columns of the output; tiles of rows may be part full at the end of every expert."""
    parts: int = 0
    """Experts at whose ends tiles of rows are part full."""
    tile: configs.Config | None = None
    """Of a product."""
    epilogue_bytes: int = 2
    """Bytes that the epilogue reads and writes for each output."""
    kernels: int = 1

    @property
    def flops(self) -> float:
        return 2 * self.depth * self.outputs[0] * self.outputs[1]


def launches(
    tokens: float, width: int, hidden: int, experts: int, top_k: int, training: bool
) -> Iterator[Launch]:  # fmt: skip
    """A forward pass, or both, in 16 bits: the products, routing, and what only moves rows."""
    rows = tokens * top_k
    weight, logits, token_rows = 2 * experts * width * hidden, 4 * tokens * experts, 2 * tokens * width
    narrow, wide = 2 * rows * width, 2 * rows * hidden

    def tile(kernel: str, depth: int, columns: int) -> configs.Config:
        return configs.heuristic(90, kernel, "half", configs.bucket_of(rows, experts), depth, columns)

    def to_hidden(kernel: str) -> tuple:
        return width, (rows, hidden), experts, tile(kernel, width, hidden)

    to_width = hidden, (rows, width), experts, tile("project_rows", hidden, width)
    if training:
        yield Launch("project_in, z kept", narrow + weight + 2 * wide, *to_hidden("project_in"), epilogue_bytes=4)
    else:
        yield Launch("project_in", narrow + weight + wide, *to_hidden("project_in"))
    yield Launch("project_rows", wide + weight + narrow, *to_width)
    yield Launch("router_logits", token_rows + logits)
    yield Launch("topk_gating", logits + 8 * rows + 4 * tokens, kernels=2)
    yield Launch("dispatch", 16 * rows, kernels=3)
    yield Launch("combine", narrow + token_rows)
    if training:
        both_weights = (2 * experts * hidden, width), 0, tile("expert_gradients", hidden, width)
        yield Launch("project_back", narrow + weight + 3 * wide, *to_hidden("project_back"), epilogue_bytes=6)
        yield Launch("expert_gradients", 2 * (narrow + wide + weight), rows / experts, *both_weights)
        yield Launch("project_rows, dx", wide + weight + narrow, *to_width)
        yield Launch("gate_gradient", 4 * rows * hidden / 128 + token_rows)
        yield Launch("gather_sum", narrow + token_rows)
        yield Launch("topk_gating_backward", 2 * logits + 8 * rows + 4 * tokens)
        yield Launch("router_logits_backward", 2 * token_rows + 2 * logits + 8 * 2048 * width, kernels=3)
        yield Launch("sum of x's gradients", 3 * token_rows)


class Prediction(NamedTuple):
    """Milliseconds of a launch: what bounds it, each alone, and the whole."""

    tensor: float
    shared: float
    l2: float
    dram: float
    total: float
    waves: float
    blocks: int
    """Blocks that share a multiprocessor."""


def predict(launch: Launch, l2_bytes: float, dram_bytes: float = DRAM_BYTES) -> Prediction:
    """The model of the file's first lines."""
    dram, start = launch.bytes / dram_bytes * 1e3, launch.kernels * LAUNCH * 1e3
    tile = launch.tile
    if tile is None:
        return Prediction(0, 0, 0, dram, dram + start, 0, 0)
    block_m, block_n, block_k = tile[:3]
    tiles = (launch.outputs[0] / block_m + launch.parts / 2) * (launch.outputs[1] / block_n)
    blocks = min(2, SHARED_BYTES // (2 * (block_m + block_n) * block_k * tile.num_stages))
    tensor = 2 * block_m * block_n * launch.depth / TENSOR_FLOPS
    through_l2 = 2 * (block_m + block_n) * launch.depth + launch.epilogue_bytes * block_m * block_n
    l2 = through_l2 / (l2_bytes / MULTIPROCESSORS / CLOCK)
    through_shared = 2 * (2 * block_m + (1 + tile.num_warps // 4) * block_n) * launch.depth
    shared = through_shared / SHARED_RATE
    of_tile = max(tensor, shared, l2) + (START if blocks == 1 else 0)
    waves = tiles / (MULTIPROCESSORS * blocks)
    in_all = tiles / MULTIPROCESSORS / CLOCK * 1e3
    total = max(-(-waves // 1) * blocks * of_tile / CLOCK * 1e3, dram) + start
    return Prediction(tensor * in_all, shared * in_all, l2 * in_all, dram, total, waves, blocks)


def dense(rows: float, width: int, hidden: int, training: bool, cublas_flops: float, dram_bytes: float) -> float:
    """Milliseconds of a dense MLP on as many rows in torch: products at cuBLAS's rate, and passes over memory for the
    activation, its slope, and the sums that are the biases' gradients."""
    flops = (3 if training else 1) * 4 * rows * width * hidden
    passes = (2 + (3 if training else 0)) * 2 * rows * hidden + (2 * rows * (hidden + width) if training else 0)
    return 1e3 * (flops / cublas_flops + passes / dram_bytes)


LAYER = {
    "--tokens": number(50_000, "T"),
    "--width": number(768, "D"),
    "--hidden": number(3072, "H"),
    "--experts": number(8, "E"),
    "--top-k": number(2, "K"),
}
"""The options that name a layer, the main case by default."""


def main(argv: list[str] | None = None) -> None:
    options = LAYER | {
        "--l2": number(7.5, "TB/s of the second-level cache"),
        "--memory": number(2.6, "TB/s of memory; an H200 has 3.8"),
        "--cublas": number(720.0, "TFLOP/s of dense_k's products"),
    }
    args = parser(__doc__, options).parse_args(argv)
    layer = args.tokens, args.width, args.hidden, args.experts, args.top_k
    print(f"{'launch':22} {'blocks':>6} {'waves':>6} {'tensor':>7} {'shared':>7} {'L2':>7} {'memory':>7} {'ms':>7}")
    for training in (False, True):
        total = 0.0
        for launch in launches(*layer, training):
            prediction = predict(launch, args.l2 * 1e12, args.memory * 1e12)
            total += prediction.total
            times = " ".join(f"{ms:7.2f}" for ms in prediction[:5])
            print(f"{launch.name:22} {prediction.blocks or '':6} {prediction.waves:6.1f} {times}")
        peer = dense(args.tokens * args.top_k, *layer[1:3], training, args.cublas * 1e12, args.memory * 1e12)
        what = "forward + backward" if training else "forward"
        print(f"{what:22} {total:52.2f}, {total / peer:.2f} of dense_k ({peer:.2f} ms at cuBLAS's rate)\n")


if __name__ == "__main__":
    main()
