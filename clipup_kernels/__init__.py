"""Fused kernels for Mixture-of-Experts layers: token routing, permutation, grouped expert MLP and combine.

    gating = topk_gating(router_logits(x, router), k=2, renormalize=True)
    plan = dispatch(gating.expert_indices, num_experts=8, capacity_factor=1.0)
    y = expert_mlp(x, gating.gates, plan, in_weight, in_bias, out_weight, out_bias, "gelu")

The ops are registered as ``torch.ops.clipup.*``: they work under autograd, ``torch.func`` in reverse mode, autocast,
``torch.compile(fullgraph=True)`` and ``FlopCounterMode``. ``clipup_kernels.reference`` has the stages of the
layer in plain torch.
"""

from . import reference
from ._version import __version__ as __version__
from .backend_info import backend_info
from .backends.extension import release_memory
from .ops import sparse_mlp as sparse_mlp  # registers the op of whole layers
from .ops.attention import self_attention
from .ops.expert_mlp import dense_mlp, expert_glu, expert_mlp
from .ops.packed_weights import pack_weight, packed_layout, unpack_weight
from .ops.routing import dispatch, router_logits, topk_gating
from .ops.rows import combine, grouped_linear, permute
from .types import ACTIVATIONS, MAX_EXPERTS, Gating, PackedWeight, Plan

__all__ = [
    "ACTIVATIONS",
    "MAX_EXPERTS",
    "Gating",
    "PackedWeight",
    "Plan",
    "backend_info",
    "combine",
    "dense_mlp",
    "dispatch",
    "expert_glu",
    "expert_mlp",
    "grouped_linear",
    "pack_weight",
    "packed_layout",
    "permute",
    "reference",
    "release_memory",
    "router_logits",
    "self_attention",
    "topk_gating",
    "unpack_weight",
]
