"""The executor finds faults: a changed line in the PTX of a kernel is caught, by a fault it names or by results."""

import importlib.metadata
import re

import pytest
import torch
from moe_cases import Shape, assert_follows_oracle, experts_case, gating_case, plan_case, rows_cases
from ptx.faults import Fault

from clipup_kernels.triton import configs

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
PRODUCT_WAIT, PROXY = r"wgmma\.wait_group\.sync\.aligned \d;", (r"fence\.proxy\.async\.shared::cta;", "")
EARLY = (PRODUCT_WAIT, "wgmma.wait_group.sync.aligned 2;")
UNFENCED = (r"wgmma\.fence\.sync\.aligned;", "")
SHIFTED_MATRIX = (r"(or\.b64 \t%rd\d+, %rd\d+, 46116862933052948)48", r"\g<1>50")
UNTIMED = (r"mbarrier\.try_wait\S+ (\w+), \[%r\d+\], %r\d+;", r"setp.eq.u32 \1, 0, 0;")
HOPPER = {
    "project_in waits for a step too few": ("_project_in", EARLY, 0, False, r"cp\.async.* still reading"),
    "project_rows waits for a step too few": ("_project_rows", EARLY, 0, False, r"cp\.async.* still reading"),
    "project_back stores sums too early": ("_project_back", EARLY, -1, False, r"stmatrix.* waited for.* wgmma"),
    "project_in, no wgmma.fence": ("_project_in", UNFENCED, 0, False, r"wgmma.* no wgmma.fence .* mov"),
    "expert_gradients, no wgmma.fence": ("_expert_gradients", UNFENCED, 0, False, r"wgmma.* no wgmma.fence .* mov"),
    "project_rows, no proxy fence": ("_project_rows", PROXY, 0, False, r"wgmma.* no fence.proxy.async .* cp\.async"),
    "expert_gradients, no proxy fence": ("_expert_gradients", PROXY, 0, False, r"no fence.proxy.async .* cp\.async"),
    "project_in, barrier before a product": ("_project_in", DROPPED, 0, False, r"race .* wgmma.* cp\.async"),
    "project_back, barrier after a product": ("_project_back", DROPPED, 1, False, r"race .* cp\.async.* wgmma"),
    "project_in, shifted matrix": ("_project_in", SHIFTED_MATRIX, 0, False, "output: error"),
    "project_in, no wait for a box": ("_project_in", UNTIMED, 0, True, r"wgmma.* waited for.* cp\.async\.bulk"),
    "project_in, no arrival": ("_project_in", (r"@%p\d+ mbarrier\.arrive[^;]*;", ""), 0, True, "wait.* without end"),
}  # fmt: skip
"""For sm_90, with the words that name the fault and its lines; the fourth: whether weights are read by tensor maps."""
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


@pytest.mark.parametrize(("kernel", "pattern", "number", "maps", "words"), HOPPER.values(), ids=HOPPER)
def test_a_changed_line_is_found_on_sm_90(executing, monkeypatch, kernel, pattern, number, maps, words):
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda *which: choose(*which)._replace(descriptors=maps))
    with (
        executing(90, change=mutation(kernel, pattern, number)) as driver,
        pytest.raises((Fault, AssertionError), match=words),
    ):
        assert_follows_oracle(EXPERTS)
    assert driver.launched


@pytest.mark.parametrize(("case", "kernel"), EQUIVALENT.values(), ids=EQUIVALENT)
def test_a_barrier_before_any_access_to_shared_memory_may_go(executing, case, kernel):
    with executing(change=mutation(kernel, DROPPED, 0)) as driver:
        assert_follows_oracle(case)
    assert driver.launched[kernel]


@pytest.mark.parametrize("case", [EXPERTS, EXACT, PERMUTED, COMBINED, LINEAR, PLAN, GATING], ids=lambda case: case.op)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_as_compiled_raise_no_alarm(executing, case, arch):
    with executing(arch):
        assert_follows_oracle(case)
