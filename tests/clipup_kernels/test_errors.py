"""A wrong argument raises before any memory is written; the message names it, its value and what was expected."""

import numpy as np
import pytest
import torch
from moe_cases import SHAPES, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels.backends import extension

SHAPE = SHAPES["plain"]
T, D, H, E, K = SHAPE


def call_expert_mlp(**changed):
    gates, plan = route(SHAPE)
    arguments = dict(x=randn(T, D), gates=gates, plan=plan, **make_experts(SHAPE)._asdict()) | changed
    return ck.expert_mlp(**arguments)


def call_topk_gating(**changed):
    return ck.topk_gating(**(dict(logits=randn(T, E), k=K, renormalize=True) | changed))


def call_dispatch(**changed):
    expert_indices = ck.topk_gating(randn(T, E), K, True).expert_indices
    return ck.dispatch(**(dict(expert_indices=expert_indices, num_experts=E) | changed))


def call_permute(**changed):
    return ck.permute(**(dict(x=randn(T, D), plan=route(SHAPE)[1]) | changed))


def call_combine(**changed):
    gates, plan = route(SHAPE)
    return ck.combine(**(dict(rows=randn(T * K, D), gates=gates, plan=plan) | changed))


def call_grouped_linear(**changed):
    experts = make_experts(SHAPE)
    arguments = dict(
        rows=randn(T * K, D), weight=experts.in_weight, bias=experts.in_bias, offsets=route(SHAPE)[1].offsets
    )
    return ck.grouped_linear(**(arguments | changed))


def call_router_logits(**changed):
    return ck.router_logits(**(dict(x=randn(T, D), weight=randn(E, D)) | changed))


PLAN = route(SHAPE)[1]
NESTED = torch.nested.nested_tensor([randn(2, D), randn(3, D)])
WRONG = [
    (call_topk_gating, dict(logits=randn(T, E).half()), TypeError, "logits must be float32.*got float16"),
    (call_topk_gating, dict(logits=randn(T)), ValueError, r"logits must have shape \[T, E\], got \[96\]"),
    (call_topk_gating, dict(logits="x"), TypeError, "logits must be a tensor, got str"),
    (call_topk_gating, dict(k=0), ValueError, r"k must be between 1 and the number of experts \(8\), got 0"),
    (call_topk_gating, dict(k=9), ValueError, "k must be between 1 .* got 9"),
    (call_topk_gating, dict(k=1.5), TypeError, "k must be an int, got float"),
    (call_topk_gating, dict(mask=torch.ones(T)), TypeError, "mask must be bool, got float32"),
    (call_topk_gating, dict(mask=torch.ones(T + 1, dtype=torch.bool)), ValueError, r"mask must have shape \[96\]"),
    (call_topk_gating, dict(selection_bias=randn(E + 1)), ValueError, r"selection_bias must have shape \[8\]"),
    (call_topk_gating, dict(mask=torch.ones(T, dtype=torch.bool, device="meta")), ValueError, "mask is on meta"),
    (call_dispatch, dict(expert_indices=torch.zeros(T, K)), TypeError, "expert_indices must be int32, got float32"),
    (call_topk_gating, dict(renormalize="yes"), TypeError, "renormalize must be True or False, got 'yes'"),
    (call_topk_gating, dict(renormalize=None), TypeError, "renormalize must be True or False, got None"),
    (
        call_topk_gating,
        dict(logits=randn(T, 0)),
        ValueError,
        "k must be between 1 and the number of experts .0., got 2",
    ),
    (call_dispatch, dict(num_experts=0), ValueError, "num_experts must be a positive int, got 0"),
    (call_dispatch, dict(num_experts=2**31), ValueError, "num_experts must be at most 1048576, got 2147483648"),
    (call_expert_mlp, dict(in_weight=[1.0]), TypeError, "in_weight must be a tensor, got list"),
    (call_expert_mlp, dict(out_bias="x"), TypeError, "out_bias must be a tensor, got str"),
    (call_grouped_linear, dict(weight=1.0), TypeError, "weight must be a tensor, got float"),
    (call_dispatch, dict(capacity_factor=0.0), ValueError, "capacity_factor must be positive and finite.*got 0.0"),
    (call_dispatch, dict(capacity_factor=-1), ValueError, "capacity_factor must be positive.*got -1"),
    (call_dispatch, dict(capacity_factor=float("nan")), ValueError, "capacity_factor must be positive.*got nan"),
    (call_dispatch, dict(capacity_factor="1"), TypeError, "capacity_factor must be a number or None, got str"),
    (call_dispatch, dict(priority=randn(T, 1)), ValueError, r"priority must have shape \[96\], got \[96, 1\]"),
    (call_dispatch, dict(mask=torch.ones(T)), TypeError, "mask must be bool"),
    (call_permute, dict(x=randn(T + 1, D)), ValueError, r"plan.row_of_choice must have shape \[97, K\], got \[96, 2\]"),
    (call_permute, dict(x=torch.zeros(T, D, dtype=torch.int64)), TypeError, "x must be float32.*got int64"),
    (call_permute, dict(plan=tuple(PLAN)), TypeError, "plan must be the Plan that dispatch.. returns, got tuple"),
    (call_permute, dict(plan=PLAN._replace(choice_of_row=PLAN.choice_of_row[1:])), ValueError, "plan.choice_of_row"),
    (call_permute, dict(plan=PLAN._replace(offsets=PLAN.offsets.long())), TypeError, "plan.offsets must be int32"),
    (call_combine, dict(gates=randn(T, K).bfloat16()), TypeError, "gates must be float32, got bfloat16"),
    (call_combine, dict(gates=randn(T, K + 1)), ValueError, r"gates must have shape \[96, 2\], got \[96, 3\]"),
    (call_combine, dict(rows=randn(T, D)), ValueError, r"rows must have shape \[192, D\], got \[96, 32\]"),
    (call_grouped_linear, dict(weight=randn(E, H, D + 1)), ValueError, r"weight must have shape \[E, O, 32\]"),
    (call_grouped_linear, dict(weight=randn(E, H, D).half()), TypeError, "weight is float16 but rows is float32"),
    (call_grouped_linear, dict(bias=randn(E, H + 1)), ValueError, r"bias must have shape \[8, 64\], got \[8, 65\]"),
    (call_grouped_linear, dict(offsets=PLAN.offsets[1:]), ValueError, r"offsets must have shape \[9\], got \[8\]"),
    (call_expert_mlp, dict(x=randn(T, D).bfloat16()), TypeError, "in_weight is float32 but x is bfloat16"),
    (call_expert_mlp, dict(out_bias=randn(E, D).double()), TypeError, "out_bias is float64 but x is float32"),
    (call_expert_mlp, dict(in_weight=randn(E, H, D + 1)), ValueError, r"in_weight must have shape \[E, H, 32\]"),
    (call_expert_mlp, dict(out_weight=randn(E, H, D)), ValueError, r"out_weight must have shape \[8, 32, 64\]"),
    (call_expert_mlp, dict(in_bias=randn(H)), ValueError, r"in_bias must have shape \[8, 64\], got \[64\]"),
    (call_expert_mlp, dict(gate_bias=randn(E, H)), ValueError, "gate_bias was given without gate_weight"),
    (call_expert_mlp, dict(gate_weight=randn(E, D, H)), ValueError, r"gate_weight must have shape \[8, 64, 32\]"),
    (call_expert_mlp, dict(activation="swish"), ValueError, "activation must be one of gelu, .*got 'swish'"),
    (call_expert_mlp, dict(recompute="half"), ValueError, "recompute must be 'none' or 'full', got 'half'"),
    (call_expert_mlp, dict(gates=randn(T, 1)), ValueError, r"gates must have shape \[96, 2\], got \[96, 1\]"),
    (call_expert_mlp, dict(activation=np.zeros(2)), ValueError, "activation must be one of gelu"),
    (call_dispatch, dict(capacity_factor=10**400), ValueError, "capacity_factor must be positive and finite"),
    (call_expert_mlp, dict(x=randn(T, D).to_sparse()), TypeError, "x must be a dense tensor.*got torch.sparse_coo"),
    (call_grouped_linear, dict(rows=randn(T * K, D).to_mkldnn()), TypeError, "rows must be a dense.*got torch._mkldnn"),
    (call_router_logits, dict(weight=randn(E, D).to_sparse()), TypeError, "weight must be a dense.*got torch.sparse_c"),
    (call_router_logits, dict(x=NESTED), TypeError, "x must be a dense tensor.*got a nested tensor"),
    (call_permute, dict(x=NESTED), TypeError, "x must be a dense tensor.*got a nested tensor"),
    (call_expert_mlp, dict(x=randn(T, D, 1)), ValueError, r"x must have shape \[T, D\], got \[96, 32, 1\]"),
]


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"),
    WRONG,
    ids=[f"{c.__name__[5:]}-{'-'.join(w)}-{i}" for i, (c, w, _, _) in enumerate(WRONG)],
)
def test_a_wrong_argument_is_named(call, changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.skipif(extension.NATIVE is None, reason="the other backends leave this to torch")
@pytest.mark.parametrize("op", ["router_logits", "grouped_linear", "pack_weight"])
def test_a_weight_whose_storage_was_freed_is_refused(op):
    experts = make_experts(SHAPE).in_weight
    calls = {
        "router_logits": (randn(E, D), lambda weight: ck.router_logits(randn(T, D), weight)),
        "grouped_linear": (experts, lambda weight: call_grouped_linear(weight=weight)),
        "pack_weight": (experts, ck.pack_weight),
    }
    weight, call = calls[op]
    call(weight)
    weight.untyped_storage().resize_(0)  # as FSDP2 does between the passes
    with pytest.raises(RuntimeError, match=r"has no memory: its storage was freed"):
        call(weight)
