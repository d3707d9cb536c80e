"""Host time of a pass's launches, with a driver that launches nothing: what Python costs before the GPU has work.

    python benchmarks/gpu_host.py

Tensors are small, in float16 and on the CPU; kernels are compiled for sm_90 once. No GPU is needed, and none is used.
What is missing is the driver itself, and torch's allocator of GPU memory in place of that of the CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import triton
from harness import print_table
from triton.backends.compiler import GPUTarget

from clipup_kernels.triton import dispatch, expert_mlp, expert_mlp_backward, router_logits, topk_gating


class NoDriver:
    """A CUDA driver whose kernels do nothing, and that counts them."""

    def __init__(self) -> None:
        self.launched = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 32, 0, 1024),
            get_device_properties=lambda _: dict(max_shared_mem=232448, warpSize=32),
        )

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> None:
        self.launched += 1

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def passes(tokens: int, width: int, hidden: int, experts: int, top_k: int) -> dict[str, Callable[[], object]]:
    """What is timed: routing, and the experts in both passes."""

    def half(*size: int) -> torch.Tensor:
        return torch.randn(size).half()

    x, router, gates = half(tokens, width), torch.randn(experts, width), torch.rand(tokens, top_k)
    plan = torch.zeros(experts + 1).int(), torch.zeros(tokens * top_k).int(), torch.zeros(tokens, top_k).int()
    weights = half(experts, hidden, width), half(experts, hidden), half(experts, width, hidden), half(experts, width)
    routed = (x, gates, *plan, *weights, None, None)
    z = half(tokens * top_k, hidden)

    def routing() -> None:
        logits = router_logits.router_logits(x, router)
        _, indices, *_ = topk_gating.topk_gating(logits, top_k, True)
        dispatch.dispatch(indices, experts)

    return {
        "routing": routing,
        "experts, forward": lambda: expert_mlp.expert_mlp_forward(*routed, "gelu", True),
        "experts, backward": lambda: expert_mlp_backward.expert_mlp_backward(x, *routed, z, "gelu", [True] * 4),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="(default 1000)")
    options = parser.parse_args(argv)
    driver = NoDriver()
    triton.runtime.driver.set_active(driver)
    rows = []
    for name, run in passes(64, 64, 128, 8, 2).items():
        run()
        driver.launched = 0
        run()
        number, times = driver.launched, []
        for _ in range(options.calls):
            start = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - start))
        us = median(times)
        rows.append({"pass": name, "launches": number, "us": f"{us:.0f}", "us_per_launch": f"{us / number:.1f}"})
    print_table(rows, ["pass", "launches", "us", "us_per_launch"])


if __name__ == "__main__":
    main()
