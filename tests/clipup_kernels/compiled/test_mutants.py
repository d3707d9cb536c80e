"""The executor finds faults: a changed line in the PTX of a kernel is caught, by a fault it names or by results."""

import importlib.metadata
import re

import pytest
import torch
from moe_cases import Shape, assert_follows_oracle, experts_case, gating_case, plan_case, rows_cases
from ptx.faults import Fault

if importlib.metadata.version("triton") < "3.9":
    pytest.skip("the lines are those of Triton 3.9", allow_module_level=True)
pytestmark = pytest.mark.compiled
DEEP = Shape(150, 256, 160, 2, 2)  # more steps than stages, and several tiles
EXPERTS = experts_case(DEEP, dtype=torch.bfloat16)
EXACT = experts_case(Shape(40, 48, 64, 4, 2), dtype=torch.float32)
PERMUTED, COMBINED, LINEAR = rows_cases(DEEP, "capacity", torch.bfloat16)[:3]
PLAN, GATING = plan_case(700, 8, 2, 0.9, True), gating_case(200, 8, 2)

DROPPED = (r"(?m)^\tbar\.sync \t0;", "")
LATE = (r"cp\.async\.wait_group \t?(0x)?\d+;", "cp.async.wait_group 9;")
UNMASKED_STORE = (r"@%p\d+ (st\.global)", r"\1")
UNMASKED_LOAD = (r"@%p\d+ (ld\.global)", r"\1")
SHIFTED_LOAD = (r"(ld\.shared\S* \t?[^\[]*\[%r\d+)(\+\d+)?\]", r"\1+16]")
SHIFTED_STORE = (r"(st\.shared\S* \t?\[\s*%r\d+)( ?\+ ?\d+)?\s*\]", r"\1+16]")
SWAPPED = (r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2")
TRANSPOSED = (r"\.trans\.", ".")
MUTANTS = {
    "project_in waits late": (EXPERTS, "_project_in", LATE, 0),
    "project_rows waits late": (EXPERTS, "_project_rows", LATE, 0),
    "project_back waits late": (EXPERTS, "_project_back", LATE, 0),
    "expert_gradients waits late": (EXPERTS, "_expert_gradients", LATE, 0),
    "project_in, first barrier": (EXPERTS, "_project_in", DROPPED, 0),
    "project_in, third barrier": (EXPERTS, "_project_in", DROPPED, 2),
    "project_rows, first barrier": (EXPERTS, "_project_rows", DROPPED, 0),
    "project_back, first barrier": (EXPERTS, "_project_back", DROPPED, 0),
    "expert_gradients, first barrier": (EXPERTS, "_expert_gradients", DROPPED, 0),
    "float32 project_in, first barrier": (EXACT, "_project_in", DROPPED, 0),
    "project_in, barrier of the epilogue": (EXPERTS, "_project_in", DROPPED, 4),
    "count, second barrier": (PLAN, "_count", DROPPED, 1),
    "assign, first barrier": (PLAN, "_assign", DROPPED, 0),
    "gating, second barrier": (GATING, "_gating", DROPPED, 1),
    "project_in, swapped fragment": (EXPERTS, "_project_in", SWAPPED, 0),
    "project_rows, swapped fragment": (EXPERTS, "_project_rows", SWAPPED, 3),
    "expert_gradients, swapped fragment": (EXPERTS, "_expert_gradients", SWAPPED, 0),
    "expert_gradients, not transposed": (EXPERTS, "_expert_gradients", TRANSPOSED, 0),
    "project_in, store without its mask": (EXPERTS, "_project_in", UNMASKED_STORE, 1),
    "permute, store without its mask": (PERMUTED, "_permute", UNMASKED_STORE, -1),
    "gather_sum, load without its mask": (COMBINED, "_gather_sum", UNMASKED_LOAD, 1),
    "assign, store without its mask": (PLAN, "_assign", UNMASKED_STORE, 3),
    "gating, store without its mask": (GATING, "_gating", UNMASKED_STORE, 0),
    "float32 project_in, shifted load": (EXACT, "_project_in", SHIFTED_LOAD, 0),
    "project_in, shifted store": (EXPERTS, "_project_in", SHIFTED_STORE, 0),
    "weight_gradient, shifted store": (LINEAR, "_weight_gradient", SHIFTED_STORE, 0),
}  # fmt: skip
EQUIVALENT = {"count": (PLAN, "_count"), "gating": (GATING, "_gating")}
"""Their first barrier comes before any access to shared memory."""


def changed(text: str, pattern: str, replacement: str, number: int) -> str:
    """``text`` with one occurrence of ``pattern`` replaced."""
    match = list(re.finditer(pattern, text))[number]
    return text[: match.start()] + match.expand(replacement) + text[match.end() :]


def mutation(kernel: str, pattern: tuple[str, str], number: int):
    def mutate(text: str) -> str:
        return changed(text, *pattern, number) if f".entry {kernel}(" in text else text

    return mutate


@pytest.mark.parametrize(("case", "kernel", "pattern", "number"), MUTANTS.values(), ids=MUTANTS)
def test_a_changed_line_is_found(executing, case, kernel, pattern, number):
    with executing(change=mutation(kernel, pattern, number)) as driver, pytest.raises((Fault, AssertionError)) as found:
        assert_follows_oracle(case)
    print(found.value)  # pytest -rP shows what names each fault
    assert driver.launched


@pytest.mark.parametrize(("case", "kernel"), EQUIVALENT.values(), ids=EQUIVALENT)
def test_a_barrier_before_any_access_to_shared_memory_may_go(executing, case, kernel):
    with executing(change=mutation(kernel, DROPPED, 0)) as driver:
        assert_follows_oracle(case)
    assert driver.launched[kernel]


@pytest.mark.parametrize("case", [EXPERTS, EXACT, PERMUTED, COMBINED, LINEAR, PLAN, GATING], ids=lambda case: case.op)
def test_kernels_as_compiled_raise_no_alarm(executing, case):
    with executing():
        assert_follows_oracle(case)
