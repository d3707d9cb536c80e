"""What the layer is compared with: dense MLPs and the usual ways to write a Mixture of Experts in plain torch.

Every function takes (x [T, D], weights) and returns y [T, D]; the sparse ones route with the same router: softmax over
E experts, the best K, gates renormalised, nothing dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import clipup_kernels as ck


class Weights(NamedTuple):
    router: Tensor  # [E, D]
    in_weight: Tensor  # [E, H, D]
    in_bias: Tensor  # [E, H]
    out_weight: Tensor  # [E, D, H]
    out_bias: Tensor  # [E, D]
    top_k: int


def make_weights(d_model, d_hidden, num_experts, top_k, dtype, device="cpu", skew=False) -> Weights:
    """Random weights. ``skew`` biases the router (through x's first feature, see ``make_x``) to one expert."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(device, dtype)

    router = normal(num_experts, d_model)
    if skew:  # the first feature of x is 1: it lifts expert 0's logit for all tokens
        router[0, 0] += 8
    return Weights(
        router,
        normal(num_experts, d_hidden, d_model),
        normal(num_experts, d_hidden),
        normal(num_experts, d_model, d_hidden),
        normal(num_experts, d_model),
        top_k,
    )


def make_x(tokens, d_model, dtype, device="cpu", seed=1) -> Tensor:
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1
    return x.to(device, dtype)


def mlp(x: Tensor, w: Weights, expert: int) -> Tensor:
    hidden = F.gelu(F.linear(x, w.in_weight[expert], w.in_bias[expert]))
    return F.linear(hidden, w.out_weight[expert], w.out_bias[expert])


def dense_1(x: Tensor, w: Weights) -> Tensor:
    """One dense MLP on T rows: what the dense model pays."""
    return mlp(x, w, 0)


def dense_k(x: Tensor, w: Weights) -> Tensor:
    """One dense MLP on K*T rows: the sparse layer's arithmetic without any routing."""
    return mlp(x, w, 0)


def route(x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    probs = F.linear(x.float(), w.router.float()).softmax(-1)
    gates, experts = probs.topk(w.top_k)
    return gates / gates.sum(-1, keepdim=True), experts


def loop(x: Tensor, w: Weights) -> Tensor:
    """A loop over the experts with index_add, as most model code has it."""
    gates, experts = route(x, w)
    y = torch.zeros_like(x)
    for expert in range(w.router.shape[0]):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        y.index_add_(0, token, mlp(x[token], w, expert) * gates[token, choice, None].to(x.dtype))
    return y


def loop_unbind(x: Tensor, w: Weights) -> Tensor:
    """The same loop with the stacked weights unbound once, which spares its backward a stack of zero gradients."""
    gates, experts = route(x, w)
    y = torch.zeros_like(x)
    unbound = zip(w.in_weight.unbind(), w.in_bias.unbind(), w.out_weight.unbind(), w.out_bias.unbind(), strict=True)
    for expert, (in_weight, in_bias, out_weight, out_bias) in enumerate(unbound):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        out = F.linear(F.gelu(F.linear(x[token], in_weight, in_bias)), out_weight, out_bias)
        y = y.index_add(0, token, out * gates[token, choice, None].to(x.dtype))
    return y


def grouped_mm(x: Tensor, w: Weights) -> Tensor:
    """Rows sorted by expert, ``torch.nn.functional.grouped_mm``, biases and activation apart, index_add back."""
    gates, experts = route(x, w)
    flat = experts.flatten()
    owner, order = flat.sort(stable=True)
    offsets = torch.bincount(flat, minlength=w.router.shape[0]).cumsum(0).int()
    token = order // w.top_k
    hidden = F.grouped_mm(x[token], w.in_weight.mT, offs=offsets) + w.in_bias[owner]
    out = F.grouped_mm(F.gelu(hidden), w.out_weight.mT, offs=offsets) + w.out_bias[owner]
    return torch.zeros_like(x).index_add(0, token, out * gates.flatten()[order, None].to(x.dtype))


def clipup(x: Tensor, w: Weights) -> Tensor:
    """This project's ops, as ``SparseMoE`` calls them."""
    logits = F.linear(x.float(), w.router.float())
    gating = ck.topk_gating(logits, w.top_k, renormalize=True)
    plan = ck.dispatch(gating.experts, w.router.shape[0])
    return ck.expert_mlp(x, gating.gates, plan, w.in_weight, w.in_bias, w.out_weight, w.out_bias, "gelu")


def oracle(x: Tensor, w: Weights) -> Tensor:
    """The same layer in float64 by the reference ops; routed on the same float32 logits."""
    logits = F.linear(x.float(), w.router.float())
    gating = ck.reference.topk_gating(logits, w.top_k, renormalize=True)
    plan = ck.reference.dispatch(gating.experts, w.router.shape[0])
    parameters = (t.double() for t in w[1:5])
    return ck.reference.expert_mlp(x.double(), gating.gates.double(), plan, *parameters, "gelu")


DENSE = {"dense_1": dense_1, "dense_k": dense_k}
SPARSE = {"loop": loop, "loop_unbind": loop_unbind, "grouped_mm": grouped_mm, "clipup": clipup}
IMPLEMENTATIONS = DENSE | SPARSE
