"""The body of moe_forward.py and moe_training.py: options, correctness first, then timing, table and CSV."""

from __future__ import annotations

import argparse
import sys
import traceback
from itertools import product
from typing import NamedTuple

import harness
import torch
from gemm_peak import GemmPeak
from harness import (
    CSV,
    DTYPES,
    Options,
    alternate,
    built_from,
    commit,
    number,
    one_line,
    peak_megabytes,
    print_table,
    require_device,
    write_csv,
)
from moe_layer import ROUTINGS, Case, Weights, make_x, without_close_calls
from peers import PEERS, Candidate, candidates, oracle, refusal, usual
from torch import Tensor

from clipup_kernels.machine import processor_name

BASELINE = "dense_k"
NEEDED = {BASELINE, "clipup"}
"""With ``--skip-failing`` timed and marked even where their results are off."""
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}
INT8_TOLERANCE = 8e-2
"""Of implementations whose weights are quantized; what that does to models is measured by int8_accuracy.py."""
CHECKED_TOKENS = {"cpu": 96, "cuda": 4096}
"""Tokens that are compared with the oracle: on a GPU enough for experts with many rows, whose tiles are larger."""
TRAINING_SHAPES = [(1576, 768, 3072), (616, 512, 2048)]
FORWARD_SHAPES = [(197, 768, 3072), *TRAINING_SHAPES]
FULL = [Case(4928, 512, 2048, 8)]
FULL += [Case(6304, 768, 3072, experts) for experts in (8, 16, 64)] + [Case(6304, 768, 3072, 8, "skewed")]
"""What ``--suite full`` adds: large batches, more experts for the same rows, and one expert that takes half of them."""
SHOWN = "impl median_ms tflops ratio_to_dense_k peak_share".split()


def shape(text: str) -> tuple[int, int, int]:
    tokens, width, hidden = map(int, text.split("x"))
    return tokens, width, hidden


def options(training: bool) -> Options:
    shapes = TRAINING_SHAPES if training else FORWARD_SHAPES
    cores = torch.get_num_threads()
    return CSV | {
        "--shapes": {
            "nargs": "+", "type": shape, "default": shapes,
            "help": f"TOKENSxD_MODELxD_HIDDEN (default: {' '.join('x'.join(map(str, size)) for size in shapes)})",
        },
        "--num-experts": {"nargs": "+", "type": int, "default": [8], "help": "experts of the layer (default: 8)"},
        "--top-k": number(2, "choices a token"),
        "--routing": {
            "nargs": "+", "choices": ROUTINGS, "default": ["balanced"],
            "help": "skewed: one expert takes half of all rows (default: balanced)",
        },
        "--suite": {
            "choices": ["default", "full"], "default": "default",
            "help": "default: small shapes; full: adds 4928x512x2048, E = 8, 16, 64 and the skewed routing at "
            "6304x768x3072, and one thread",
        },
        "--dtype": {"nargs": "+", "choices": list(DTYPES), "default": ["fp32", "bf16"], "help": "(default: fp32 bf16)"},
        "--impl": {"nargs": "+", "choices": list(PEERS), "help": "(default: the usual ones that can run here)"},
        "--skip-failing": {
            "action": "store_true",
            "help": "go on: leave out, by name, what fails or is off; of dense_k and clipup, fill off_by",
        },
        "--threads": {"nargs": "+", "type": int, "help": f"CPU threads (default: {cores}; --suite full: 1 too)"},
        "--device": {"choices": list(CHECKED_TOKENS), "default": "cpu", "help": "(default: cpu)"},
        "--rounds": {"type": int, "help": "least number of alternating rounds (default: 3, --suite full: 5)"},
        "--seconds": {
            "type": float, "help": "timing budget of one case and dtype, in seconds (default: 2, --suite full: 5)"
        },
    }  # fmt: skip


def parse(description: str, training: bool, argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser(description, options(training))
    cores = torch.get_num_threads()
    args = parser.parse_args(argv)
    args.impl = args.impl or usual(training, args.device)
    for impl in args.impl:
        if why := refusal(impl, training, args.device):
            parser.error(f"--impl: {impl} {why}")
    full = args.suite == "full"
    if args.top_k != 2 and (full or "skewed" in args.routing):
        parser.error("--top-k: skewed routing, which --suite full has too, needs 2")
    args.rounds = args.rounds or (5 if full else 3)
    args.seconds = (5.0 if full else 2.0) if args.seconds is None else args.seconds
    args.threads = [""] if args.device != "cpu" else args.threads or sorted({1, cores} if full else {cores})
    asked = [Case(*size, *rest) for size, *rest in product(args.shapes, args.num_experts, args.routing)]
    args.cases = list(dict.fromkeys(asked + (FULL if full else [])))
    return args


class Wrong(NamedTuple):
    """How an implementation differs from the oracle."""

    words: str
    off_by: float | None
    """The largest error over the largest entry; None if it gave no result."""


def check(timed: dict[str, Candidate], dtype: str, device: str, training: bool) -> dict[str, Wrong]:
    """Compares all candidates with the float64 oracle on fresh tokens; says what is wrong with those that are off.

    Each runs twice on the weights that are timed, so that what is kept from the first call is checked too.
    """
    width = next(iter(timed.values())).x.shape[1]
    x = make_x(CHECKED_TOKENS[device], width, DTYPES[dtype], device, seed=7)
    for sparse in [candidate.weights for candidate in timed.values() if isinstance(candidate.weights, Weights)][:1]:
        x = without_close_calls(x, sparse)
    wanted: dict[type, tuple[Tensor, ...]] = {}
    wrong: dict[str, Wrong] = {}
    for impl, candidate in timed.items():
        kind = type(candidate.weights)
        if kind not in wanted:
            wanted[kind] = results(Candidate(oracle, exactly(x), kind(*map(exactly, candidate.weights))), training)
        try:
            for _ in range(2):
                error = max(map(largest_error, results(candidate._replace(x=x), training), wanted[kind]))
                allowed = INT8_TOLERANCE if "int8" in PEERS[impl].weights else TOLERANCE[dtype]
                if not error <= allowed:
                    wrong[impl] = Wrong(f"is off by {error:.1e} of the largest entry", error)
        except Exception as failure:  # other projects' own, of every kind; the caller decides what it stops
            traceback.print_exc()
            wrong[impl] = Wrong(f"fails: {one_line(failure)}", None)
    return wrong


def exactly(value: Tensor | int) -> Tensor | int:
    """A leaf in float64."""
    return value.detach().double().requires_grad_() if isinstance(value, Tensor) else value


def results(candidate: Candidate, training: bool) -> tuple[Tensor, ...]:
    """The output; when training also the gradients of the input and the parameters."""
    with torch.inference_mode(not training):
        y = candidate.forward()
        return (y, *candidate.gradients(y.detach())) if training else (y,)


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact entry; infinite for a NaN, which ``max`` of several might pass over."""
    return ((actual.double() - exact).abs().nan_to_num(torch.inf).max() / exact.abs().max()).item()


def saved_megabytes(candidate: Candidate) -> float:
    """MB that autograd keeps between forward and backward beside the layer's own arguments."""
    arguments = {t.untyped_storage().data_ptr() for t in (candidate.x, *candidate.weights.parameters)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = candidate.forward()
    del result
    return sum(storages[pointer] for pointer in storages.keys() - arguments) / 1e6


def measure(
    args: argparse.Namespace, case: Case, dtype: str, threads: int | str, training: bool, peak: GemmPeak
) -> list[dict]:
    """The rows of one case and dtype; ``peak`` is measured before and after."""
    if args.device == "cpu":
        torch.set_num_threads(threads)
    timed = candidates(dict.fromkeys([BASELINE, *args.impl]), case, args.top_k, DTYPES[dtype], args.device)
    wrong = check(timed, dtype, args.device, training)
    for impl, (words, off_by) in wrong.items():
        if not args.skip_failing or (impl == BASELINE and off_by is None):
            raise SystemExit(f"{impl} in {dtype} {words}; nothing was timed")
        marked = impl in NEEDED and off_by is not None
        print(f"{'off' if marked else 'left out'}: {impl} in {dtype} {words}", file=sys.stderr, flush=True)
        if not marked:
            del timed[impl]
    peak.measure(dtype, DTYPES[dtype], threads)
    with torch.inference_mode(not training):
        runners = {impl: candidate.runner(training) for impl, candidate in timed.items()}
        timings = alternate(runners, BASELINE, args.seconds, args.device, args.rounds)
        peaks = {impl: f"{peak_megabytes(run):.1f}" if args.device == "cuda" else "" for impl, run in runners.items()}
    peak.measure(dtype, DTYPES[dtype], threads)
    rows = []
    for impl in dict.fromkeys(impl for impl in args.impl if impl in timed):
        num_rows = case.tokens * (1 if impl == "dense_1" else args.top_k)
        flops = num_rows * 2 * 2 * case.d_model * case.d_hidden * (3 if training else 1)
        rows.append({
            "device": processor_name(args.device), "dtype": dtype, "threads": threads, "tokens": case.tokens,
            "d_model": case.d_model, "d_hidden": case.d_hidden, "experts": case.experts, "top_k": args.top_k,
            "routing": case.routing, "pass": "fwd_bwd" if training else "fwd", "impl": impl,
            **timings[impl].columns(3),
            "tflops": f"{flops / timings[impl].median_ms / 1e9:.4g}",
            "ratio_to_dense_k": f"{timings[impl].ratio:.3f}", "peak_share": "",
            "saved_mb": f"{saved_megabytes(timed[impl]) if training else 0:.1f}", "peak_mb": peaks[impl],
            **built_from(), "off_by": f"{wrong[impl].off_by:.1e}" if impl in wrong else "",
        })  # fmt: skip
    return rows


def main(description: str, training: bool, argv: list[str] | None = None) -> int:
    args = parse(description, training, argv)
    require_device(args.device)
    settings = list(product(args.threads, args.cases, args.dtype))
    print(f"{processor_name(args.device)}, commit {commit() or 'unknown'}; times in ms")
    print(
        f"{len(settings)} tables, each of {len(args.impl)} implementations: checked against float64, then timed in turn"
    )
    print(f"with dense_k for at least {args.seconds:g} s. ratio_to_dense_k is the median of pair-by-pair ratios")
    columns = SHOWN + (["saved_mb"] if training else []) + (["peak_mb"] if args.device == "cuda" else [])
    peak, rows, lost = GemmPeak(args.device), [], False
    for count, (threads, case, dtype) in enumerate(settings, 1):
        on = f", threads: {threads}" if threads else ""
        layer = f"{case.tokens} tokens x {case.d_model}/{case.d_hidden}, {case.experts} experts, {case.routing}"
        print(f"\n{count} of {len(settings)}: {dtype}, {layer}{on}", flush=True)
        fresh = measure(args, case, dtype, threads, training, peak)
        rows += fresh
        lost |= "clipup" in args.impl and "clipup" not in {row["impl"] for row in fresh}
        for row in rows:  # all rows again: the peak may have risen
            row["peak_share"] = f"{peak.share(row):.3f}"
        if not fresh:  # all of them failed
            continue
        print_table(fresh, columns + ["off_by"] * any(row["off_by"] for row in fresh))
        if args.csv:
            write_csv(args.csv, rows)
    print()
    for (dtype, threads), rate in peak.best.items():
        print(f"peak_share 1.000: {rate:.3f} TFLOP/s, {dtype}" + (f", threads: {threads}" if threads else ""))
    if args.csv:
        print(f"wrote {len(rows)} rows to {args.csv}", file=sys.stderr)
    return int(lost or any(row["off_by"] for row in rows))
