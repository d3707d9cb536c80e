"""Every op on Triton's kernels, interpreted, against plain torch in float64, both passes.

In float32 and float16: the interpreter's bfloat16 is wrong.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import (
    GATINGS,
    ROUTERS,
    ROUTINGS,
    Shape,
    assert_follows_oracle,
    assert_nan_chooses_existing_experts,
    assert_same,
    calls_of,
    experts_case,
    gating_case,
    glu_case,
    plan_case,
    results,
    router_case,
    rows_cases,
    strided,
    usual,
)
from triton.tools.tensor_descriptor import TensorDescriptor

import clipup_kernels as ck
from clipup_kernels.backends import registry
from clipup_kernels.triton import configs, dispatch, router_logits, topk_gating

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("on_triton")]
HALVES = (torch.float32, torch.float16)
ODD = Shape(13, 19, 37, 3, 2)
SIZES = (ODD, "one_token", "no_token", Shape(24, 32, 64, 4, 2), Shape(3, 16, 24, 12, 2))

EMPTY = ("capacity", "all_masked", "all_dropped", "one_expert_takes_all")


@pytest.mark.parametrize("ranges", [1, 3, 40])
def test_the_gradient_of_the_router_is_the_sum_over_all_ranges_of_tokens(monkeypatch, ranges):
    monkeypatch.setattr(router_logits, "_PARTIAL_SUMS", 4 * ranges)
    assert_follows_oracle(router_case((301, 16, 4)))


def test_statistics_of_many_programs_are_added_up(monkeypatch):
    monkeypatch.setattr(topk_gating, "_MAX_PROGRAMS", 3)
    assert_follows_oracle(gating_case(2000, 16, 2))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("only", ["gates", "top_prob", "mean_probs", "z_loss"])
def test_each_output_of_gating_alone_has_its_gradient(only, renormalize):
    assert_follows_oracle(gating_case(40, 6, 3, renormalize, masked=0.4), only=only)


def test_nan_logits_never_give_an_expert_that_does_not_exist():
    assert_nan_chooses_existing_experts()


def test_normalized_gates_are_those_of_the_choices_however_improbable_and_zero_of_impossible_ones():
    logits = torch.tensor([[0.0, -300.0, -300.0], [0.0, -torch.inf, -torch.inf], [0.0, 1.0, torch.nan]])
    gates, experts, *_ = ck.topk_gating(logits.requires_grad_(), 2, True, torch.tensor([-10.0, 0.0, 0.0]))
    assert experts[:2].tolist() == [[1, 2]] * 2 and gates[:2].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert gates[2].isnan().all()
    (gradient,) = torch.autograd.grad(gates, logits, torch.tensor([[1.0, 2.0]] * 3))
    assert gradient[:2].tolist() == [[0.0, -0.25, 0.25], [0.0, 0.0, 0.0]]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 900), experts=st.integers(1, 20), k=st.integers(1, 4),
    factor=st.one_of(st.none(), st.floats(0.05, 3.0)), prioritised=st.booleans(),
    masked=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_plan_is_the_oracles(tokens, experts, k, factor, prioritised, masked, seed):
    assert_follows_oracle(plan_case(tokens, experts, k, factor, prioritised, masked, seed))


@pytest.mark.parametrize(("tokens", "experts"), [(2500, 16), (165, 256), (100, 300)])
def test_plans_of_many_blocks_and_many_experts_are_the_oracles(monkeypatch, tokens, experts):
    monkeypatch.setattr(dispatch, "_MAX_BLOCKS", 4)
    monkeypatch.setattr(dispatch, "_SCAN_ROWS", 8)
    assert_follows_oracle(plan_case(tokens, experts, 2, 0.9, True))


def test_an_expert_that_does_not_exist_gets_no_row_and_adds_nothing_to_the_capacity():
    experts = torch.tensor([[2, 2]] * 4 + [[0, 9]] + [[0, 0]] * 3, dtype=torch.int32)
    plan = ck.dispatch(experts, 2, 0.5)
    assert plan.offsets.tolist() == [0, 2, 2]  # 0.5 * 2 * 4 / 2 rows
    assert (plan.row_of_choice[:4] == -1).all() and plan.row_of_choice[4, 1] == -1
    twice = torch.randint(-1, 3, (400, 3), generator=torch.Generator().manual_seed(5)).int()
    torch.testing.assert_close(ck.dispatch(twice, 3, 0.8), ck.reference.dispatch(twice, 3, 0.8))


UNUSUAL = {
    "float32 next to the capacity is larger": plan_case(25, 2, 1, 1.2),  # 1.2 * 25 / 2 is 15 in float64
    **{f"capacity of {factor}": plan_case(25, 2, 1, factor) for factor in (1e-300, 5e-324, 1e300, 1.7e308)},
    **{
        f"{case.op} {width} wide": case
        for width in (0, 1, 255, 300, 768)
        for case in rows_cases(Shape(21, width, 16, 4, 2), "capacity", torch.float16)[:2]
    },
    "one weight, recomputed": glu_case(ODD, recompute="full"),
    "one weight": glu_case(ODD, dtype=torch.float16),
    **{
        f"no {bias}": experts_case(ODD, activation="silu", gated=True, **{bias: None})
        for bias in ("in_bias", "gate_bias")
    },
    **{
        f"no {size}, {gated}": experts_case(Shape(20, 16, 16, 2, 2), gated=gated, **{size: 0})
        for size in ("width", "hidden")
        for gated in (False, True)
    },
    "an epilogue in parts": experts_case(Shape(80, 64, 160, 2, 2), dtype=torch.float16, activation="silu"),
    **{f"gating, {name}": gating_case(**options) for name, options in GATINGS.items()},
}


@pytest.mark.parametrize(
    ("make", "case"),
    calls_of(router_case, *usual(size=ROUTERS, dtype=HALVES, masked=(None, 0.4, 1.0)))
    + calls_of(rows_cases, *usual(shape=SIZES, routing=EMPTY, dtype=HALVES, bias=(True, False)))
    + calls_of(
        experts_case,
        *usual(
            shape=SIZES, routing=("capacity", "masked", "one_expert_takes_all"), dtype=HALVES, bias=(True, False),
            gated=(False, True), recompute=("none", "full"),
        ),
        *usual(shape=SIZES[-1:], activation=ck.ACTIVATIONS, gated=(False, True)),
    )
    + [pytest.param(lambda one=one: one, {}, id=name) for name, one in UNUSUAL.items()],
)  # fmt: skip
def test_ops_follow_the_oracle(make, case):
    made = make(**case)
    for one in made if isinstance(made, list) else [made]:
        assert_follows_oracle(one)


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", [pytest.param("half", marks=pytest.mark.slow), "tf32", "ieee"])
def test_tiles_fit_together_along_rows_columns_and_terms(monkeypatch, kind, gated):
    monkeypatch.setattr(configs, "arithmetic", lambda dtype: kind)
    dtype = torch.float16 if kind == "half" else torch.float32
    shape = Shape(210, 80, 140, 3, 2) if kind == "half" else Shape(120, 40, 100, 3, 2)
    rows = shape.tokens * shape.k
    tile = configs.choose("project_in", torch.device("cpu"), dtype, rows, shape.experts, shape.width, shape.hidden)
    assert tile.block_m < rows / shape.experts and tile.block_n < shape.hidden and tile.block_k < shape.width
    assert_follows_oracle(experts_case(shape, "dropless", dtype, gated=gated))


@pytest.fixture
def by_descriptors(monkeypatch):
    """Makes every launch load weights by descriptors; the value lists the weights for which one was made."""
    choose, made, make = configs.choose, [], TensorDescriptor.from_tensor

    def chosen(kernel, *which):
        return choose(kernel, *which)._replace(block_k=32, descriptors=kernel not in configs.GRADIENTS)

    monkeypatch.setattr(configs, "choose", chosen)
    monkeypatch.setattr(
        TensorDescriptor, "from_tensor", lambda tensor, block: made.append(tensor) or make(tensor, block)
    )
    return made


@pytest.mark.parametrize(
    ("shape", "gated", "descriptors"),
    [(Shape(80, 64, 256, 2, 2), False, 4), (Shape(80, 64, 160, 2, 2), True, 6), (ODD, True, 0)],
    ids=["even", "uneven", "unaligned"],
)
def test_weights_read_by_descriptors_follow_the_oracle(by_descriptors, shape, gated, descriptors):
    assert_follows_oracle(experts_case(shape, dtype=torch.float16, gated=gated))
    assert len(by_descriptors) == descriptors


def test_a_weight_on_an_odd_address_is_read_by_pointers(by_descriptors):
    case = experts_case(Shape(80, 64, 160, 2, 2), dtype=torch.float16)
    weight = case.arguments["in_weight"]
    moved = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(weight.shape)
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    with torch.no_grad():
        want = ck.expert_mlp(**case.arguments)
        by_descriptors.clear()
        assert torch.equal(ck.expert_mlp(**case.arguments | {"in_weight": moved}), want) and len(by_descriptors) == 1


def test_the_halves_of_one_weight_are_read_where_they_are(by_descriptors):
    """With z recomputed, which reads them too: descriptors of the whole weight's memory, and no copy."""
    case = glu_case(Shape(40, 64, 96, 3, 2), dtype=torch.float16, recompute="full")
    whole = case.arguments["gate_in_weight"].untyped_storage().data_ptr()
    again = results(case)
    assert {one.untyped_storage().data_ptr() for one in by_descriptors} == {
        whole, case.arguments["out_weight"].untyped_storage().data_ptr(),
    }  # fmt: skip
    assert_same(again, results(case._replace(arguments=case.arguments | {"recompute": "none"})))


EVERY_OP = [
    router_case("odd", masked=0.4),
    gating_case(70, 8, 2, masked=0.3),
    plan_case(120, 4, 2, 1.0, True, 0.2),
    *rows_cases(ODD, "capacity"),
    experts_case(ODD, gated=True),
]
EACH = pytest.mark.parametrize("case", EVERY_OP, ids=lambda case: case.op)


@EACH
def test_strided_arguments_poisoned_outputs_and_a_second_run_give_the_same_bits(poisoned_memory, case):
    assert_same(results(case), results(strided(case)))


@EACH
def test_only_the_wanted_gradients_are_computed_and_they_do_not_change(case):
    """Gradients of both sides' parameters are one launch with tiles of its own: alone, their sums may round
    otherwise."""
    whole = results(case)
    leaves = [what.removeprefix("gradient of ") for what in whole if what.startswith("gradient of ")]
    for frozen in [leaves[1:], leaves[:1], [name for name in leaves if name.startswith("out")]] if leaves[1:] else ():
        for what, value in results(case, frozen=frozen).items():
            scale = float(whole[what].abs().max())
            torch.testing.assert_close(value, whole[what], rtol=1e-5, atol=1e-6 * scale, msg=what)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda t, d, h, e, k: Shape(t, d, h, e, min(k, e)),
        st.integers(0, 120), st.integers(1, 90), st.integers(1, 90), st.integers(1, 9), st.integers(1, 4),
    ),
    routing=st.sampled_from(ROUTINGS), gated=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_routing_follows_the_oracle(shape, routing, gated, seed):
    for case in (experts_case(shape, routing, gated=gated, seed=seed), *rows_cases(shape, routing, seed=seed)):
        assert_follows_oracle(case)


def test_a_weight_whose_memory_was_freed_is_named():
    case = experts_case()
    case.arguments["in_weight"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(5, 53, 19\) has no memory"):
        ck.expert_mlp(**case.arguments)


def test_every_op_is_computed_by_triton(on_triton):
    for case in (*EVERY_OP, experts_case(ODD), glu_case(ODD)):
        results(case)
    assert [on_triton] == [set(backend.modules) for backend in registry.BACKENDS if backend.name == "triton"]


@pytest.mark.parametrize("case", [EVERY_OP[0], *EVERY_OP[3:]], ids=lambda case: case.op)
def test_bfloat16_is_refused_because_the_interpreter_is_silently_wrong(case):
    narrow = {
        name: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() and name != "gates" else value
        for name, value in case.arguments.items()
    }
    if case.op == "router_logits":
        narrow["weight"] = case.arguments["weight"]
    with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
        getattr(ck, case.op)(**narrow)
