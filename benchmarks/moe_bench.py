"""The body of moe_forward.py and moe_training.py: options, correctness first, then timing, table and CSV."""

from __future__ import annotations

import argparse
import sys

import torch
from baselines import IMPLEMENTATIONS, SPARSE, Weights, make_weights, make_x, oracle
from harness import alternate, commit, device_name, package_version, print_table, write_csv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}
DEFAULT_SHAPES = ["197x768x3072", "616x512x2048", "1576x768x3072"]
FIELDS = (
    "device dtype threads tokens d_model d_hidden experts top_k pass impl median_ms p20_ms p80_ms tflops "
    "ratio_to_dense_k saved_mb commit torch triton"
).split()


def parse(description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, help="TOKENSxD_MODELxD_HIDDEN")
    parser.add_argument("--num-experts", nargs="+", type=int, default=[8])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--impl", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--skew", action="store_true", help="a router that sends most tokens to one expert first")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing budget of one shape and dtype, in seconds")
    parser.add_argument("--csv", help="file to write the rows to")
    args = parser.parse_args(argv)
    for shape in args.shapes:
        if len(shape.split("x")) != 3 or not all(part.isdigit() and int(part) > 0 for part in shape.split("x")):
            parser.error(f"--shapes: expected TOKENSxD_MODELxD_HIDDEN such as 1576x768x3072, got {shape!r}")
    for num_experts in args.num_experts:
        if not 1 <= args.top_k <= num_experts:
            parser.error(f"--top-k must be between 1 and --num-experts ({num_experts}), got {args.top_k}")
    return args


def check(impl: str, weights: Weights, dtype: str, device: str, training: bool) -> None:
    """Compares an implementation with the float64 oracle on 96 fresh tokens; raises when it is off."""
    x = make_x(96, weights.in_weight.shape[2], DTYPES[dtype], device, seed=7)
    inputs = []
    for precision in (lambda t: t, lambda t: t.double() if t.is_floating_point() else t):
        tensors = [precision(t).detach().clone().requires_grad_(training) for t in (x, *weights[:-1])]
        inputs.append((tensors[0], Weights(*tensors[1:], weights.top_k)))
    (x_ours, w_ours), (x_oracle, w_oracle) = inputs
    results = [IMPLEMENTATIONS[impl](x_ours, w_ours)], [oracle(x_oracle, w_oracle)]
    if training:
        for result, leaf_x, leaf_w in ((results[0], x_ours, w_ours), (results[1], x_oracle, w_oracle)):
            leaves = [leaf_x, *leaf_w[1:5]]
            result.extend(torch.autograd.grad(result[0].float().square().sum(), leaves))
    for ours, want in zip(*results, strict=True):
        error = ((ours.double() - want).abs().max() / want.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{impl} in {dtype} is off by {error:.1e} of the largest entry; nothing was timed")


def saved_megabytes(function, x: torch.Tensor, weights: Weights) -> float:
    """MB that autograd keeps between forward and backward beside the layer's own arguments."""
    arguments = {t.data_ptr() for t in (x, *weights[:-1])}
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in arguments and storage.data_ptr() not in arguments:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(x, weights)
    del result
    return sum(storages.values()) / 1e6


def measure(
    args: argparse.Namespace, shape: str, num_experts: int, dtype: str, threads: int, training: bool
) -> list[dict]:
    tokens, d_model, d_hidden = map(int, shape.split("x"))
    if args.device == "cpu":
        torch.set_num_threads(threads)
    weights = make_weights(d_model, d_hidden, num_experts, args.top_k, DTYPES[dtype], args.device, args.skew)
    for impl in args.impl:
        if impl in SPARSE:
            check(impl, weights, dtype, args.device, training)
    weights = Weights(*(t.requires_grad_(training) for t in weights[:-1]), weights.top_k)
    inputs = {
        "dense_1": make_x(tokens, d_model, DTYPES[dtype], args.device).requires_grad_(training),
        "dense_k": make_x(tokens * args.top_k, d_model, DTYPES[dtype], args.device).requires_grad_(training),
    }

    def runner(impl: str):
        function, x = IMPLEMENTATIONS[impl], inputs.get(impl, inputs["dense_1"])
        if not training:
            return lambda: function(x, weights)
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
        leaves = [x, *weights[1:5]]
        return lambda: torch.autograd.grad(function(x, weights), leaves, dy)

    candidates = {impl: runner(impl) for impl in dict.fromkeys(["dense_k", *args.impl])}
    with torch.inference_mode(not training):
        timings = alternate(candidates, "dense_k", args.seconds, args.device)
    rows = []
    for impl, timing in timings.items():
        if impl not in args.impl:
            continue
        x = inputs.get(impl, inputs["dense_1"])
        products = tokens * (1 if impl == "dense_1" else args.top_k) * 2 * 2 * d_model * d_hidden
        flops = products * (3 if training else 1)
        saved = saved_megabytes(IMPLEMENTATIONS[impl], x, weights) if training else 0.0
        values = (
            device_name(args.device), dtype, threads if args.device == "cpu" else "", tokens, d_model, d_hidden,
            num_experts, args.top_k, "fwd_bwd" if training else "fwd", impl, f"{timing.median_ms:.3f}",
            f"{timing.p20_ms:.3f}", f"{timing.p80_ms:.3f}", f"{flops / timing.median_ms / 1e9:.3f}",
            f"{timing.ratio:.3f}", f"{saved:.1f}", commit(), torch.__version__, package_version("triton"),
        )  # fmt: skip
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def main(description: str, training: bool, argv: list[str] | None = None) -> int:
    args = parse(description, argv)
    print(
        f"{device_name(args.device)}; times in ms, ratio_to_dense_k is the median of pair-by-pair ratios\n", flush=True
    )
    columns = [
        "dtype",
        "threads",
        "tokens",
        "d_model",
        "d_hidden",
        "experts",
        "impl",
        "median_ms",
        "tflops",
        "ratio_to_dense_k",
    ]
    if training:
        columns.append("saved_mb")
    rows = []
    for threads in args.threads:
        for shape in args.shapes:
            for num_experts in args.num_experts:
                for dtype in args.dtype:
                    fresh = measure(args, shape, num_experts, dtype, threads, training)
                    print_table(fresh, columns)
                    print(flush=True)
                    rows += fresh
    if args.csv:
        write_csv(args.csv, rows)
        print(f"wrote {len(rows)} rows to {args.csv}", file=sys.stderr)
    return 0
