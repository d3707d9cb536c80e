"""Host time of a pass's launches, with a driver that launches nothing: what Python costs before the GPU has work.

    python benchmarks/gpu_host.py

Tensors are small, in float16 and on the CPU; kernels are compiled for sm_90 once. No GPU is needed, and none is used.
What is missing is the driver itself, and torch's allocator of GPU memory instead of that of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
import triton
from gpu_kernels import layer_tensors
from harness import clock, number, parser, print_table
from triton.backends.compiler import GPUTarget

from clipup_kernels.triton import dispatch, expert_mlp, expert_mlp_backward, router_logits, topk_gating


def driver_without_a_gpu(launched: list) -> SimpleNamespace:
    """A CUDA driver whose kernels do nothing but be listed in ``launched``."""
    return SimpleNamespace(
        utils=SimpleNamespace(
            load_binary=lambda *_: (0, 0, 32, 0, 1024),
            get_device_properties=lambda _: dict(max_shared_mem=232448, warpSize=32),
        ),
        launcher_cls=lambda *_: lambda *given, **_: launched.append(given[0]),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )


def passes(tokens: int, width: int, hidden: int, experts: int, top_k: int) -> dict[str, Callable[[], object]]:
    """What is timed: routing, and the experts in both passes."""
    t = layer_tensors(tokens, width, hidden, experts, top_k, torch.float16, "cpu")
    z = torch.empty(tokens * top_k, hidden, dtype=torch.float16)

    def routing() -> None:
        logits = router_logits.router_logits(t.x, t.router)
        _, indices, *_ = topk_gating.topk_gating(logits, top_k, True)
        dispatch.dispatch(indices, experts)

    return {
        "routing": routing,
        "experts, forward": lambda: expert_mlp.expert_mlp_forward(*t.routed, "gelu", True),
        "experts, backward": lambda: expert_mlp_backward.expert_mlp_backward(t.dy, *t.routed, z, "gelu", [True] * 4),
    }


def main(argv: list[str] | None = None) -> None:
    calls = parser(__doc__, {"--calls": number(1000, "of each pass")}).parse_args(argv).calls
    launched: list = []
    triton.runtime.driver.set_active(driver_without_a_gpu(launched))
    rows = []
    for name, run in passes(64, 64, 128, 8, 2).items():
        run()
        launched.clear()
        run()
        launches = len(launched)
        us = 1e6 * median(clock(run, "cpu") for _ in range(calls))
        rows.append({"pass": name, "launches": launches, "us": f"{us:.0f}", "us_per_launch": f"{us / launches:.1f}"})
    print_table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
