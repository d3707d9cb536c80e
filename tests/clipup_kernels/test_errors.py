"""A wrong argument raises before any memory is written; the message names it."""

import numpy as np
import pytest
import torch
from moe_cases import SHAPES, dense_case, experts_case, gating_case, glu_case, plan_case, randn, router_case, rows_cases

import clipup_kernels as ck
from clipup_kernels.backends import extension

T, D, H, E, K = SHAPES["plain"]
CASES = [
    router_case((T, D, E)),
    gating_case(T, E, K),
    plan_case(T, E, K),
    *rows_cases("plain", "dropless"),
    experts_case("plain", "dropless"),
    glu_case("plain", "dropless"),
    dense_case("plain"),
]
CASES = {case.op: case for case in CASES}
PLAN = CASES["permute"].arguments["plan"]
NESTED = torch.nested.nested_tensor([randn(2, D), randn(3, D)])
MASK = torch.ones(T, dtype=torch.bool)


def call(op, **changed):
    return getattr(ck, op)(**(CASES[op].arguments | changed))


WRONG = [
    ("topk_gating", "logits", randn(T, E).half(), TypeError),
    ("topk_gating", "logits", randn(T), ValueError),
    ("topk_gating", "logits", "x", TypeError),
    ("topk_gating", "k", 0, ValueError),
    ("topk_gating", "k", 9, ValueError),
    ("topk_gating", "k", 1.5, TypeError),
    ("topk_gating", "mask", torch.ones(T), TypeError),
    ("topk_gating", "mask", torch.ones(T + 1, dtype=torch.bool), ValueError),
    ("topk_gating", "mask", MASK.to("meta"), ValueError),
    ("topk_gating", "selection_bias", randn(E + 1), ValueError),
    ("topk_gating", "renormalize", None, TypeError),
    ("dispatch", "expert_indices", torch.zeros(T, K), TypeError),
    ("dispatch", "num_experts", 0, ValueError),
    ("dispatch", "num_experts", 2**31, ValueError),
    ("dispatch", "capacity_factor", 0.0, ValueError),
    ("dispatch", "capacity_factor", float("nan"), ValueError),
    ("dispatch", "capacity_factor", 10**400, ValueError),
    ("dispatch", "capacity_factor", "1", TypeError),
    ("dispatch", "priority", randn(T, 1), ValueError),
    ("dispatch", "mask", torch.ones(T), TypeError),
    ("permute", "x", torch.zeros(T, D, dtype=torch.int64), TypeError),
    ("permute", "x", NESTED, TypeError),
    ("permute", "plan", tuple(PLAN), TypeError),
    ("permute", "plan", PLAN._replace(choice_of_row=PLAN.choice_of_row[1:]), ValueError),
    ("permute", "plan", PLAN._replace(offsets=PLAN.offsets.long()), TypeError),
    ("combine", "gates", randn(T, K).bfloat16(), TypeError),
    ("combine", "gates", randn(T, K + 1), ValueError),
    ("combine", "rows", randn(T, D), ValueError),
    ("grouped_linear", "weight", 1.0, TypeError),
    ("grouped_linear", "weight", randn(E, H, D + 1), ValueError),
    ("grouped_linear", "weight", randn(E, H, D).half(), TypeError),
    ("grouped_linear", "bias", randn(E, H + 1), ValueError),
    ("grouped_linear", "offsets", PLAN.offsets[1:], ValueError),
    ("grouped_linear", "rows", randn(T * K, D).to_mkldnn(), TypeError),
    ("router_logits", "weight", randn(E, D).to_sparse(), TypeError),
    ("expert_mlp", "x", randn(T, D).bfloat16(), TypeError),
    ("expert_mlp", "x", randn(T, D, 1), ValueError),
    ("expert_mlp", "in_weight", [1.0], TypeError),
    ("expert_mlp", "in_weight", randn(E, H, D + 1), ValueError),
    ("expert_mlp", "out_weight", randn(E, H, D), ValueError),
    ("expert_mlp", "in_bias", randn(H), ValueError),
    ("expert_mlp", "out_bias", randn(E, D).double(), TypeError),
    ("expert_mlp", "gate_bias", randn(E, H), ValueError),
    ("expert_mlp", "gate_weight", randn(E, D, H), ValueError),
    ("expert_mlp", "gates", randn(T, 1), ValueError),
    ("expert_mlp", "activation", np.zeros(2), ValueError),
    ("expert_mlp", "recompute", "half", ValueError),
    ("expert_glu", "gate_in_weight", randn(E, 2 * H - 1, D), ValueError),
    ("expert_glu", "out_weight", randn(E, D - 1, H), ValueError),
    ("expert_glu", "recompute", "half", ValueError),
    ("dense_mlp", "in_weight", randn(H, D + 1), ValueError),
    ("dense_mlp", "out_bias", randn(3), ValueError),
    ("dense_mlp", "activation", "selu", ValueError),
]


@pytest.mark.parametrize(
    ("op", "name", "value", "error"), WRONG, ids=[f"{op}-{name}-{i}" for i, (op, name, *_) in enumerate(WRONG)]
)
def test_a_wrong_argument_is_named(op, name, value, error):
    with pytest.raises(error, match=name):
        call(op, **{name: value})


@pytest.mark.skipif(extension.NATIVE is None, reason="the other backends leave this to torch")
@pytest.mark.parametrize("op", ["router_logits", "grouped_linear", "pack_weight"])
def test_a_weight_whose_storage_was_freed_is_refused(op):
    weight = CASES.get(op, CASES["grouped_linear"]).arguments["weight"].clone()
    weight.untyped_storage().resize_(0)  # as FSDP2 does between the passes
    with pytest.raises(RuntimeError, match="has no memory"):
        ck.pack_weight(weight) if op == "pack_weight" else call(op, weight=weight)
