"""topk_gating and dispatch on a GPU: Triton and CUDA C++, timed in alternation and compared.

    python benchmarks/gpu_stages.py --csv runs/gpu_stages.csv

``ratio`` is the time of CUDA C++ over Triton's, the median of pair-by-pair ratios: below 1 a stage is faster as C++.
``launched`` calls are timed on the device, behind a sweep that gives the host a start, ``graph`` ones inside a CUDA
graph. ``in a row`` is the time per call of 50 calls between two synchronizations: the host's, where it takes longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from harness import alternate, built_from, number, run

from clipup_kernels.backends import cpp_cuda
from clipup_kernels.machine import processor_name

TOKENS = (4096, 16_384, 50_000, 200_000, 400_000)
SIZES = ((8, 2), (64, 8))
"""Experts and choices."""
CALLS = 50
Call = Callable[[], object]


def stages(tokens: int, num_experts: int, k: int) -> Iterator[tuple[str, Call, Call]]:
    """Name, Triton's call and ours."""
    from clipup_kernels.triton import dispatch
    from clipup_kernels.triton import topk_gating as gating

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    logits, mask = normal(tokens, num_experts), torch.rand(tokens, generator=generator, device="cuda") < 0.8
    expert_indices, top_prob = gating.topk_gating(logits, k, True, None, mask)[1:3]
    gradients = (normal(tokens, k), None, normal(num_experts), normal(1)[0])
    arguments = {
        "topk_gating": (logits, k, True, None, mask),
        "topk_gating_backward": (logits, expert_indices, True, mask, *gradients),
        "dispatch": (expert_indices, num_experts, 1.0, None, mask),
        "dispatch, priority": (expert_indices, num_experts, 1.0, top_prob, mask),
    }
    for name, given in arguments.items():
        function = name.partition(",")[0]
        peer = getattr(dispatch if function == "dispatch" else gating, function)
        ours = getattr(cpp_cuda, function)
        yield name, lambda f=peer, given=given: f(*given), lambda f=ours, given=given: f(*given)


def captured(call: Call) -> Call:
    """The call as a CUDA graph that is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_a_row(call: Call) -> Call:
    """CALLS of them, waited for."""

    def calls() -> None:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return calls


WAYS: dict[str, tuple[Callable[[Call], Call], str, int]] = {
    "launched": (lambda call: call, "cuda", 1),
    "graph": (captured, "cuda", 1),
    "in a row": (in_a_row, "cpu", CALLS),
}
"""How a call is run, the clock, and how many calls that are."""


def measure(args: argparse.Namespace) -> Iterator[dict]:
    for tokens, (num_experts, k) in product(args.tokens, SIZES):
        for name, theirs, ours in stages(tokens, num_experts, k):
            torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
            for how, (wrap, clock, calls) in WAYS.items():
                times = alternate({"triton": wrap(theirs), "cuda": wrap(ours)}, "triton", args.seconds, clock)
                us = {f"{of}_us": f"{timing.median_ms * 1e3 / calls:.1f}" for of, timing in times.items()}
                yield {
                    "device": processor_name("cuda"), "stage": name, "tokens": tokens, "experts": num_experts,
                    "top_k": k, "how": how, **us, "ratio": f"{times['cuda'].ratio:.3f}", **built_from(),
                }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = {
        "--tokens": {"type": int, "nargs": "+", "default": TOKENS, "metavar": "T", "help": "(default: %(default)s)"},
        "--seconds": number(0.3, "of each measurement"),
    }
    columns = "stage tokens experts top_k how triton_us cuda_us ratio"
    return run(argv, __doc__, options, measure, columns, "microseconds a call", "cuda")


if __name__ == "__main__":
    sys.exit(main())
