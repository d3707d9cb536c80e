"""csrc/cuda as nvcc compiles it, executed on the CPU by its own host code, against the ops of the CPU.

Whatever the executor finds wrong with threads, barriers or addresses is an error too.
"""

import itertools
import math
import shutil

import pytest
import torch
from moe_cases import gating_case, plan_case, randn, seeded, usual
from ptx import cuda_driver
from ptx.faults import Fault, Unknown

from clipup_kernels.backends import cpp, cpp_cuda

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which compiles csrc/cuda"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return cuda_driver.Library(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(autouse=True)
def executed(poisoned, request, monkeypatch):
    library = request.getfixturevalue("library")  # compiled unless the test is skipped
    monkeypatch.setattr(cpp_cuda, "NATIVE", library)
    monkeypatch.setattr(cpp_cuda, "address", cuda_driver.address)
    monkeypatch.setattr(cpp_cuda, "_stream", lambda like: 0)
    return library


def drawn(values, *shape, seed=0):
    """Random ones of ``values``."""
    values = torch.as_tensor(values)
    return values[torch.randint(len(values), shape, generator=seeded(seed))]


def plan(tokens, experts, k, *options, **replaced) -> dict:
    """Arguments of ``dispatch``; some choices are missing."""
    case = plan_case(tokens, experts, min(k, experts), *options).arguments
    present = drawn([True] * 9 + [False], *case["expert_indices"].shape)
    return case | {"expert_indices": torch.where(present, case["expert_indices"], -1)} | replaced


def gating(tokens, experts, k, *options, **replaced) -> dict:
    """Arguments of ``topk_gating``; the logits of masked tokens are NaN."""
    return gating_case(tokens, experts, min(k, experts), *options).arguments | replaced


def assert_plan(arguments: dict, expected: dict | None = None) -> None:
    for ours, cpu in zip(cpp_cuda.dispatch(**arguments), cpp.dispatch(**expected or arguments), strict=True):
        assert torch.equal(ours, cpu)


def assert_gating(arguments: dict, given=(15,)) -> None:
    """Forward, and backward with the incoming gradients whose bits are set in each of ``given``."""
    logits, _, renormalize, _, mask = arguments.values()
    cpu = cpp.topk_gating(**arguments)
    torch.testing.assert_close(cpp_cuda.topk_gating(**arguments), cpu, rtol=2e-6, atol=2e-6, equal_nan=True)
    for bits in given:
        smooth = [value for value in cpu if value.is_floating_point()]
        incoming = [randn(v.numel(), seed=n).view_as(v) if bits >> n & 1 else None for n, v in enumerate(smooth)]
        back = (logits, cpu[1], renormalize, mask, *incoming)
        d_logits = cpp_cuda.topk_gating_backward(*back)
        torch.testing.assert_close(d_logits, cpp.topk_gating_backward(*back), rtol=1e-5, atol=1e-5)
        assert mask is None or (d_logits[~mask] == 0).all()


@pytest.mark.parametrize(
    "case",
    usual(
        tokens=(0, 1, 100, 700), experts=(1, 8, 256), k=(0, 1, 2, 8), factor=(None, 0.05, 1.0, 1.3, 1e300),
        prioritised=(False, True), masked=(None, 0.3),
    ),
)  # fmt: skip
def test_the_plan_is_the_cpus(case):
    assert_plan(plan(*case.values()))


PLANS = {
    "every expert of a token": lambda: plan(5, 256, 256, 0.7, True, 0.3),
    "all tokens are masked": lambda: plan(300, 4, 2, 1.0, True, 1.0),
    **{
        f"an expert named twice, {factor}": lambda f=factor: plan(
            60, 6, 4, f, True, 0.3, expert_indices=drawn([-1, 0, 1], 60, 4).int()
        )
        for factor in (None, 0.7, 1.5, 4.0)
    },
    "the most blocks, several rounds": lambda: plan(34_000, 8, 2, 1.0, True, 0.3),
}


@pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)
def test_plans_of_unusual_calls_are_the_cpus(case):
    assert_plan(case())


@pytest.mark.parametrize(("factor", "rows"), [(1.0, 125), (1.0 + 1e-12, 126)])
def test_the_capacity_is_rounded_up_in_double(factor, rows):
    offsets = cpp_cuda.dispatch(torch.full((500, 1), 2, dtype=torch.int32), 4, factor)[0]
    assert offsets.tolist() == [0, 0, 0, rows, rows]


def test_indices_outside_count_as_none():
    case = plan(70, 5, 2, 1.0, True, 0.3)
    some, outside = drawn([False, True], 70, 2), drawn([-1, -7, 5, 1000005], 70, 2, seed=1).int()
    given, cleaned = (torch.where(some, other, case["expert_indices"]) for other in (outside, -1))
    assert_plan(case | {"expert_indices": given}, case | {"expert_indices": cleaned})


@pytest.mark.parametrize(
    "case",
    usual(
        tokens=(0, 1, 40), experts=(1, 3, 8, 33, 256), k=(0, 1, 2, 8, 31), renormalize=(False, True), masked=(None, 0.3)
    ),
)  # fmt: skip
def test_gating_and_its_gradient_are_the_cpus(case):
    assert_gating(gating(*case.values(), 0.3 if case["experts"] in (3, 8) else 0.0, 2.0))


@pytest.mark.parametrize("masked", [None, 0.3])
@pytest.mark.parametrize("renormalize", [False, True])
def test_incoming_gradients_may_be_missing(renormalize, masked):
    assert_gating(gating(35, 5, 2, renormalize, masked), range(16))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("experts", [1, 5, 32, 40, 256])
def test_ties_and_nan_choose_as_on_the_cpu(experts, biased):
    logits, bias = drawn([math.nan, math.inf, -math.inf, 3e38, 0.0, -0.0, 1.0], 6, experts, seed=experts), None
    logits[0], logits[1] = 0.5, math.nan
    if biased:  # the probabilities are exact, or NaN
        logits = torch.where(logits.isfinite(), 0.0, logits)
        bias = drawn([0.0, 1.0, 2.0, math.nan], experts)
    for renormalize in (False, True):
        assert_gating(gating(6, experts, 7, renormalize, logits=logits, selection_bias=bias), ())


ALL_TO_ONE = torch.where(torch.arange(8) == 5, 200.0, randn(300, 8))  # the others' probabilities underflow
GATINGS = {
    "an expert takes all": lambda: gating(300, 8, 2, logits=ALL_TO_ONE, mask=drawn([False, True, True], 300)),
    "all tokens are masked": lambda: gating(300, 8, 2, True, 1.0),
    **{f"K = E = {experts}": lambda e=experts: gating(2, e, e, True, 0.3) for experts in (8, 40)},
    **{
        f"experts without probability, {experts}, {k}": lambda e=experts, k=k: gating(
            30, e, k, True, 0.3, 0.0, 100.0, selection_bias=2.0 * torch.arange(e)
        )
        for experts, k in ((8, 3), (40, 1), (256, 3))
    },
}


@pytest.mark.parametrize("case", GATINGS.values(), ids=GATINGS)
def test_gating_of_unusual_calls_is_the_cpus(case):
    assert_gating(case())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_calls_are_the_cpus(seed):
    size = torch.rand(8, generator=seeded(seed)).tolist()
    experts = 1 + int(size[0] * (256 if size[1] < 0.3 else 12))
    k, renormalize, masked = int(size[2] * 8), size[3] < 0.5, 0.3 if size[4] < 0.5 else None
    assert_plan(plan(int(size[5] * 900), experts, k, 2 * size[6] + 1e-3, size[3] < 0.5, masked, seed))
    assert_gating(gating(int(size[5] * 60), experts, k, renormalize, masked, 0.0, 2.0, seed), (15, int(size[7] * 15)))


@pytest.mark.slow
def test_several_rounds_of_slots_and_tokens_are_the_cpus():
    assert_plan(plan(70_000, 8, 2, 1.0, True, 0.3))
    assert_gating(gating(17_000, 8, 1, True, 0.3), ())
    assert_gating(gating(5, 256, 256, True, 0.3))


CALLS = {
    "dispatch": lambda: cpp_cuda.dispatch(**plan(4, 3, 2)),
    "topk_gating": lambda: cpp_cuda.topk_gating(**gating(2, 3, 1)),
    "topk_gating_backward": lambda: cpp_cuda.topk_gating_backward(randn(2, 3), torch.zeros(2, 1).int(), True),
}
REFUSED = [
    ("capacity_factor", lambda: cpp_cuda.dispatch(**plan(4, 3, 2, 0.0)), None),
    ("capacity_factor", lambda: cpp_cuda.dispatch(**plan(4, 3, 2, math.nan)), None),
    ("E", lambda: cpp_cuda.dispatch(**plan(4, 257, 2)), None),
    ("E", lambda: cpp_cuda.topk_gating(**gating(2, 257, 1)), None),
    ("K", lambda: cpp_cuda.topk_gating(**gating(2, 3, 3) | {"k": 4}), None),
    *((name, CALLS["dispatch"], n) for n, name in ((0, "expert_indices"), (5, "row_of_choice"), (6, "workspace"))),
    *((name, CALLS["topk_gating"], n) for n, name in ((0, "logits"), (3, "gates"), (9, "workspace"))),
    *(
        (name, CALLS["topk_gating_backward"], n)
        for n, name in ((2, "expert_indices"), (7, "d_logits"), (8, "workspace"))
    ),
]


@pytest.mark.parametrize(("name", "call", "null"), REFUSED)
def test_what_a_stage_does_not_take_is_refused_by_name_before_a_launch(executed, monkeypatch, name, call, null):
    address, count, before = cpp_cuda.address, itertools.count(), executed.launched.total()
    monkeypatch.setattr(cpp_cuda, "address", lambda tensor: 0 if next(count) == null else address(tensor))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()
    assert executed.launched.total() == before


def check_plan() -> None:
    assert_plan(plan(300, 5, 2, 0.9, True, 0.3))


def check_gating() -> None:
    assert_gating(gating(35, 5, 2))


RACE, OUTSIDE = "race in shared memory", "outside of every tensor"
MUTANTS = {
    "no barrier of the warp after the counter is read": (
        "dispatch.cu", "    __syncwarp();  // all have read it\n", "", check_plan, RACE, "*counter += __popc(same)",
    ),
    "half of the warp is matched": (
        "dispatch.cu", "sync(kAllLanes, expert)", "sync(0xFFFFU, expert)", check_plan, "not in its mask", "__match_any",
    ),
    "ranks from 1": ("dispatch.cu", "(1U << threadIdx", "(2U << threadIdx", check_plan, "", ""),
    "no barrier before the counters are summed": (
        "dispatch.cu", "take(expert); });\n  __syncthreads();\n", "take(expert); });\n", check_plan,
        RACE, "sum += counters[warp][e]",
    ),
    "a plain addition": (
        "dispatch.cu", "atomicAdd(&kept[e], all)", "kept[e] += all", check_plan, RACE, "kept[e] += all",
    ),
    "a block's own slots are in front of it": (
        "dispatch.cu", "b < block ?", "b <= block ?", check_plan, "different values", "choice_of_row[row] =",
    ),
    "every block writes the offsets": (
        "dispatch.cu", "if (block == 0) offsets", "offsets", check_plan, "two blocks write", "offsets[e] = row",
    ),
    "rows past the last one": (
        "dispatch.cu", " && row < grid.R", "", check_plan, OUTSIDE, "if (row >= first_row[grid.E])",
    ),
    "logits past the last expert": (
        "softmax.cuh", "e >= grid.E ? kMinusInfinity :", "", check_gating, OUTSIDE, "unmasked ? logits[e]",
    ),
    "no barrier before the sums of warps": (
        "topk_gating.cu", "  __syncthreads();  // also", "  //", check_gating, RACE, "sum += of_warp[w][column]",
    ),
    "sums in the order of the threads": (
        "topk_gating.cu", "of_warp[warp][v * lanes + lane] = sum", "atomicAdd(&of_warp[0][v * lanes + lane], sum)",
        check_gating, "unknown instruction", "atomicAdd(&of_warp",
    ),
    "no barrier before the next column": (
        "topk_gating.cu", "  __syncthreads();  // of_warp is free", "  //", check_gating, RACE, "[lane] = sum",
    ),
    "groups without a token leave": (
        "topk_gating_backward.cu", "const bool inside = t < end;", "if (t >= end) break;\nconst bool inside = true;",
        check_gating, "a part of the warp", "fmaxf(value, __shfl",
    ),
}  # fmt: skip
"""A file of csrc/cuda, a part of it and its replacement, a call, words of what is found, and of the line that it names
(both "" where only the results are wrong)."""


@pytest.mark.parametrize(
    ("file", "part", "replacement", "call", "words", "named"),
    [
        pytest.param(*mutant, id=name, marks=[] if number % 3 == 0 else pytest.mark.slow)
        for number, (name, mutant) in enumerate(MUTANTS.items())
    ],
)
def test_a_changed_line_is_found(executed, monkeypatch, tmp_path, file, part, replacement, call, words, named):
    copy = shutil.copytree(cuda_driver.SOURCES / "cuda", tmp_path / "cuda")
    text = (copy / file).read_text()
    assert part in text
    (copy / file).write_text(text.replace(part, replacement, 1))
    changed = [copy / file] if file.endswith(".cu") else sorted(copy.glob("*.cu"))
    monkeypatch.setattr(executed, "kernels", executed.kernels | cuda_driver.kernels_of(changed, tmp_path))
    with pytest.raises((Fault, Unknown, AssertionError), match=words or None) as found:
        call()
    lines = ((path.name, *line) for path in copy.iterdir() for line in enumerate(path.read_text().splitlines(), 1))
    places = [f"{name}:{number})" for name, number, line in lines if named in line]
    assert not words or any(place in str(found.value) for place in places)
