"""Other projects' kernels for the same layer, on CUDA, where they are installed.

Every adapter takes (x [T, D], weights) like those of ``baselines.py``, uses what the project has, and adds in plain
torch what it lacks. It is compared with the oracle before it is timed, so a release that changed its interface is left
out by name instead of being measured wrongly.

Liger-Kernel has no row: its fused experts are SwiGLU without biases, which is another layer.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from moe_layer import Weights, route
from torch import Tensor


def scattermoe(x: Tensor, w: Weights) -> Tensor:
    """Gather in the first product's loads, biases in both; the activation apart (arXiv 2403.08245)."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    gates, experts = route(x, w)
    order = flatten_sort_count(experts, w.router.shape[0])
    hidden = parallel_linear(x, w.in_weight.mT, w.top_k, *order, expert_biases=w.in_bias, grouped_out=True)
    return parallel_linear(
        F.gelu(hidden), w.out_weight.mT, 1, *order, expert_biases=w.out_bias, gates=gates.to(x.dtype), grouped_in=True
    )


def megablocks(x: Tensor, w: Weights) -> Tensor:
    """Its permutation and CUTLASS's grouped products; biases and activation apart (arXiv 2211.15841)."""
    from grouped_gemm.ops import gmm
    from megablocks import ops

    num_experts = w.router.shape[0]
    gates, experts = route(x, w)
    chosen = experts.flatten().int()
    owner, order = ops.sort(chosen, max((num_experts - 1).bit_length(), 1))
    rows_of_expert = ops.histogram(chosen, num_experts)
    ends = ops.inclusive_cumsum(rows_of_expert, 0)
    on_host = rows_of_expert.cpu().long()
    rows = ops.gather(x, order, owner, ends, w.top_k)
    hidden = gmm(rows, w.in_weight, on_host, trans_b=True) + w.in_bias[owner.long()]
    out = gmm(F.gelu(hidden), w.out_weight, on_host, trans_b=True) + w.out_bias[owner.long()]
    return ops.scatter(out, order, owner, gates.flatten().to(x.dtype), ends, w.top_k).view_as(x)


def sonicmoe(x: Tensor, w: Weights) -> Tensor:
    """The whole layer with its own router, GELU in the tanh form, which is the one it has (arXiv 2512.14080)."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    y, _, _ = moe_TC_softmax_topk_layer(
        x, w.router, w.in_weight.permute(1, 2, 0), w.in_bias, w.out_weight.permute(1, 2, 0), w.out_bias, w.top_k,
        torch.cuda.current_stream().cuda_stream, ActivationType.GELU, not torch.is_grad_enabled(),
    )  # fmt: skip
    return y


PEERS = {"scattermoe": scattermoe, "megablocks": megablocks, "sonicmoe": sonicmoe}
PACKAGES = {"scattermoe": ("scattermoe",), "megablocks": ("megablocks", "grouped_gemm"), "sonicmoe": ("sonicmoe",)}
"""What has to be installed for a peer to run."""


def missing_packages(peer: str) -> list[str]:
    """The packages of a peer that are not installed."""
    return [package for package in PACKAGES[peer] if importlib.util.find_spec(package) is None]
