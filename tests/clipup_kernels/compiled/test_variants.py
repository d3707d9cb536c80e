"""Every variant that a launch may choose, by its tile and its form, runs on the executor against float64.

``pytest -rP`` prints how many of a kernel's variants ran, how often and for how long.
"""

import time
from collections import Counter

import pytest
import torch
from moe_cases import (
    Case,
    Shape,
    assert_follows,
    experts_case,
    gating_case,
    plan_case,
    results,
    router_case,
    rows_cases,
)

from clipup_kernels import ACTIVATIONS
from clipup_kernels.triton import configs

pytestmark = [pytest.mark.compiled, pytest.mark.slow]
FEW, SOME, MANY = Shape(60, 256, 256, 2, 2), Shape(150, 256, 256, 2, 2), Shape(800, 256, 256, 2, 2)
ODD = Shape(37, 131, 259, 2, 2)
SHAPES = {80: (FEW, MANY, ODD), 90: (FEW, SOME, MANY, ODD)}
IN_SIDE, OUT_SIDE = ("out_weight", "out_bias"), ("in_weight", "in_bias", "gate_weight", "gate_bias")
TYPES = (
    (torch.bfloat16, "half"), (torch.float16, "half"), (torch.float32, "ieee"), (torch.float32, "tf32"),
)  # fmt: skip
NUMBERS = {"GROUPS", "PARTS", "TOP_K", "E", "K"}
"""Constants that are sizes of a call, not of a tile."""


def products(shape: Shape, dtype: torch.dtype) -> list[tuple[Case, tuple[str, ...]]]:
    found = [(case, ()) for case in rows_cases(shape, "capacity", dtype)]
    for gated, activation in ((False, "gelu"), (True, "silu")):
        experts = experts_case(shape, dtype=dtype, activation=activation, gated=gated)
        found += [(experts, frozen) for frozen in ((), IN_SIDE, OUT_SIDE, tuple(experts.arguments))]
    return found


def calls(arch: int, dtype: torch.dtype) -> list[tuple[Case, tuple[str, ...]]]:
    """Calls, and the arguments that get no gradient."""
    found = [call for shape in SHAPES[arch] for call in products(shape, dtype)]
    if dtype == torch.bfloat16:
        found += [
            (experts_case(MANY, dtype=dtype, activation=activation, gated=gated), ())
            for activation in ACTIVATIONS
            for gated in (False, True)
        ]
    return found + [(router_case((301, width, experts), dtype), ()) for width in (256, 131) for experts in (8, 16, 40)]


def check(case: Case, frozen: tuple[str, ...], bits: torch.dtype) -> None:
    ours, oracle = results(case, frozen=frozen), results(case, True, frozen=frozen)
    for what, value in ours.items():
        if value.is_floating_point():
            assert_follows(value, oracle[what], bits, what)


def routing_calls() -> list[tuple[Case, tuple[str, ...]]]:
    cases = [gating_case(200, 8, 1, renormalize=False), plan_case(300, 8, 2)]
    for experts, k in ((8, 2), (16, 8), (64, 8), (256, 8)):
        cases += [gating_case(100, experts, k, masked=0.2, biased=0.3), plan_case(100, experts, k, 0.9, True, 0.2)]
    return [(case, ()) for case in cases]


def key(kernel: str, signature: dict[str, str], constants: dict, num_warps: int) -> tuple:
    """Of a variant: its types, tile and form."""
    form = {name: value for name, value in constants.items() if name.isupper() and name not in NUMBERS}
    types = {kind[-4:] for kind in signature.values() if kind.startswith(("*", "tensordesc"))} & {"bf16", "fp16"}
    return kernel, *types, *sorted((name, str(value)) for name, value in form.items()), num_warps


@pytest.mark.parametrize("arch", [80, 90])
def test_every_variant_of_every_kernel_computes_its_op(executing, monkeypatch, arch):
    from gpu_static import all_variants

    launches: Counter = Counter()
    seconds: Counter = Counter()
    with executing(arch) as driver:
        launch = driver.launch

        def counted(source, metadata, *call):
            names = list(source.signature)
            constants = {names[place[0]]: value for place, value in source.constants.items()}
            start = time.perf_counter()
            launch(source, metadata, *call)
            seconds[source.fn.__name__] += time.perf_counter() - start
            launches[key(source.fn.__name__, source.signature, constants, metadata.num_warps)] += 1

        driver.launch = counted
        for case, frozen in routing_calls():
            check(case, frozen, torch.float32)
        for dtype, kind in TYPES:
            monkeypatch.setattr(configs, "arithmetic", lambda dtype, kind=kind: kind)
            for case, frozen in calls(arch, dtype):
                check(case, frozen, torch.float16 if kind == "tf32" else dtype)
        if arch == 90:  # tensor maps, which ``tune`` may choose
            choose = configs.choose
            monkeypatch.setattr(configs, "arithmetic", lambda dtype: "half")
            monkeypatch.setattr(
                configs,
                "choose",
                lambda kernel, *of: choose(kernel, *of)._replace(descriptors=kernel not in configs.GRADIENTS),
            )
            for case, frozen in products(MANY, torch.bfloat16):
                check(case, frozen, torch.bfloat16)
    listed = {
        key(v.kernel.fn.__name__, v.signature, v.constants, v.options["num_warps"]): v for v in all_variants(arch)
    }
    for kernel in sorted({kernel for kernel, *_ in listed}):
        own = [name for name in listed if name[0] == kernel]
        ran = [name for name in own if launches[name]]
        total = sum(launches[name] for name in ran)
        print(f"{kernel}: {len(ran)} of {len(own)} variants, {total} launches, {seconds[kernel]:.0f} s")
    assert not [variant.name for name, variant in listed.items() if not launches[name]]
