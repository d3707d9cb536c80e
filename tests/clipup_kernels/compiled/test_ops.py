"""Every op on Triton's kernels, compiled for sm_80 and sm_90 and executed, against plain torch in float64, both passes.

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
    "router": router_case((301, 16, 4)), "5 experts": router_case((41, 16, 5)),
    "gating": gating_case(200, 8, 2), "plan": plan_case(300, 8, 2, 0.9, True),
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
    "largest tile": experts_case(Shape(800, 256, 256, 1, 1), dtype=torch.bfloat16),
    "many experts": plan_case(165, 256, 2, 0.9, True), "few tokens": gating_case(3, 12, 4),
}  # fmt: skip


HOPPER = ("grouped_linear torch.float16", "experts torch.bfloat16", "gated experts torch.float16", "many rows")
"""Those of the fast run that multiply by ``wgmma``."""


def on_both(cases: dict, fast_on_80: bool) -> list:
    """Every case for both architectures; those that are not in the fast run are marked slow."""
    return [
        pytest.param(arch, case, id=f"sm_{arch} {name}", marks=[] if fast else pytest.mark.slow)
        for arch in (80, 90)
        for name, case in cases.items()
        for fast in [fast_on_80 if arch == 80 else name in HOPPER]
    ]


@pytest.mark.parametrize(("arch", "case"), on_both(FEW, fast_on_80=True) + on_both(MANY, fast_on_80=False))
def test_compiled_kernels_compute_the_ops(executing, arch, case):
    with executing(arch) as driver:
        assert_follows_oracle(case)
    assert driver.launched or not next(iter(case.arguments.values())).numel()


@pytest.mark.parametrize(
    ("arch", "gated"),
    [(90, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((80, False), (80, True), (90, True)))],
)
def test_float32_is_multiplied_by_tf32_where_torch_allows_it(executing, monkeypatch, arch, gated):
    monkeypatch.setattr(configs, "arithmetic", lambda dtype: "tf32")
    with executing(arch):
        assert_follows_oracle(experts_case(USUAL, gated=gated)._replace(dtype=torch.float16))  # as many bits


TMA = {
    "bfloat16": experts_case(Shape(40, 64, 128, 4, 2), dtype=torch.bfloat16), "float32": experts_case(USUAL),
    "gated": experts_case(USUAL, dtype=torch.float16, gated=True),
    "largest tile": experts_case(Shape(800, 256, 256, 1, 1), dtype=torch.bfloat16),
    "gated, largest tile": experts_case(Shape(800, 256, 256, 1, 1), dtype=torch.bfloat16, gated=True),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name != "bfloat16")) for name, case in TMA.items()]
)
def test_weights_are_read_by_tensor_maps(executing, monkeypatch, case):
    choose, texts = configs.choose, []

    def with_maps(kernel, *which):
        return choose(kernel, *which)._replace(descriptors=kernel not in configs.GRADIENTS)

    monkeypatch.setattr(configs, "choose", with_maps)
    with executing(90, change=lambda text: texts.append(text) or text):
        assert_follows_oracle(case)
    assert any("cp.async.bulk.tensor" in text for text in texts)
