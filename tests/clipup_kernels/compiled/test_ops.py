"""Every op on Triton's kernels, compiled for sm_80 and executed, against plain torch in float64, both passes.

Whatever the executor finds wrong with threads, barriers, copies or addresses is an error too.
"""

import pytest
import torch
from moe_cases import (
    Shape,
    assert_follows_oracle,
    experts_case,
    gating_case,
    glu_case,
    plan_case,
    router_case,
    rows_cases,
)

from clipup_kernels.triton import configs

pytestmark = pytest.mark.compiled
TYPES = (torch.bfloat16, torch.float16, torch.float32)
USUAL, ODD = Shape(40, 48, 64, 4, 2), Shape(13, 19, 37, 3, 2)
FEW = {
    **{f"{case.op} {dtype}": case for dtype in TYPES for case in rows_cases(USUAL, "capacity", dtype)},
    **{f"experts {dtype}": experts_case(USUAL, dtype=dtype) for dtype in TYPES},
    **{f"gated experts {dtype}": experts_case(USUAL, dtype=dtype, gated=True, activation="silu") for dtype in TYPES},
    "router": router_case((301, 16, 4)), "gating": gating_case(200, 8, 2), "plan": plan_case(300, 8, 2, 0.9, True),
}  # fmt: skip
MANY = {
    **{
        f"{case.op} {routing} {dtype} {shape.width}": case
        for dtype in TYPES
        for routing in ("all_masked", "all_dropped", "one_expert_takes_all")
        for shape in (ODD, USUAL)
        for case in rows_cases(shape, routing, dtype)
    },
    **{
        f"experts {activation} {gated} {dtype} {name}": experts_case(
            shape, dtype=dtype, activation=activation, gated=gated
        )
        for dtype in TYPES
        for activation in ("gelu", "quick_gelu", "silu", "relu")
        for gated in (False, True)
        for name, shape in {
            "odd": ODD, "no token": Shape(0, 16, 32, 2, 2), "one token": Shape(1, 16, 32, 4, 2),
            "more terms than stages": Shape(24, 192, 160, 2, 1), "some rows": Shape(120, 64, 96, 1, 1),
        }.items()
    },
    "many rows": experts_case(Shape(800, 32, 48, 1, 1), dtype=torch.bfloat16),
    "one weight": glu_case(ODD, dtype=torch.bfloat16),
    "many experts": plan_case(165, 256, 2, 0.9, True), "few tokens": gating_case(3, 12, 4),
}  # fmt: skip


@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
def test_compiled_kernels_compute_the_ops(executing, case):
    with executing() as driver:
        assert_follows_oracle(case)
    assert driver.launched


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
def test_compiled_kernels_compute_unusual_calls(executing, case):
    with executing():
        assert_follows_oracle(case)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_float32_is_multiplied_by_tf32_where_torch_allows_it(executing, monkeypatch, gated):
    monkeypatch.setattr(configs, "arithmetic", lambda dtype: "tf32")
    with executing():
        assert_follows_oracle(experts_case(USUAL, gated=gated)._replace(dtype=torch.float16))  # as many bits
