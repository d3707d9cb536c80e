"""Every op against plain torch in float64, both passes, on every backend of the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import (
    DTYPES,
    GATINGS,
    ROUTERS,
    ROUTINGS,
    SHAPES,
    Case,
    Shape,
    assert_follows_oracle,
    assert_nan_chooses_existing_experts,
    assert_same,
    calls_of,
    covering,
    dense_case,
    experts_case,
    gating_case,
    glu_case,
    plan_case,
    randn,
    results,
    router_case,
    rows_cases,
    strided,
    usual,
)
from torch import Tensor

import clipup_kernels as ck
from clipup_kernels.backends import extension

BACKENDS = ("torch_eager",) if extension.NATIVE is None else ("cpp", "torch_matmul", "torch_eager")
compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the compiled kernels promise it")


def gating_by_name(name):
    return gating_case(**GATINGS[name])


def rows_of_any(shape="odd", routing="capacity", **options):
    return rows_cases(shape, routing, **options)


TWICE = {"bias": (False, True), "gated": (False, True)}


@pytest.mark.parametrize(
    ("make", "case"),
    calls_of(router_case, *usual(size=ROUTERS, dtype=DTYPES, masked=(None, 0.4, 1.0), backend=BACKENDS))
    + calls_of(gating_by_name, *usual(name=GATINGS, backend=dict.fromkeys((BACKENDS[0], BACKENDS[-1]))))
    + calls_of(
        rows_of_any,
        *covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES),
        *usual(bias=(False, True), backend=BACKENDS),
    )
    + calls_of(
        experts_case,
        *covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES, gated=(False, True)),
        *usual(width=(0, 19), hidden=(0, 53), dtype=DTYPES, **TWICE),
        *usual(activation=ck.ACTIVATIONS, recompute=("none", "full"), backend=BACKENDS, dtype=DTYPES, **TWICE),
    )
    + calls_of(
        glu_case,
        *usual(
            shape=SHAPES, routing=ROUTINGS, dtype=DTYPES, activation=ck.ACTIVATIONS, recompute=("none", "full"),
            backend=BACKENDS,
        ),
    )
    + calls_of(
        dense_case,
        *usual(
            shape=("odd", "no_token", "one_token", Shape(3000, 19, 53, 1, 1)), dtype=DTYPES,
            activation=ck.ACTIVATIONS, **TWICE,
        ),
    ),
)  # fmt: skip
def test_ops_follow_the_oracle(force_backend, make, case):
    force_backend(case.get("backend"))
    made = make(**{name: value for name, value in case.items() if name != "backend"})
    for one in made if isinstance(made, list) else [made]:
        assert_follows_oracle(one)


SIZES = st.builds(
    lambda t, d, h, e, k: Shape(t, d, h, e, min(k, e)),
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 24), st.integers(1, 9), st.integers(1, 4),
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SIZES, st.sampled_from(ROUTINGS), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 999))
def test_any_shape_and_routing_follows_the_oracle(shape, routing, dtype, gated, seed):
    if dtype != torch.float32:  # few terms may cancel, and what is left of their rounding can be as large as their sum
        shape = shape._replace(tokens=shape.tokens + 8, width=shape.width + 8, hidden=shape.hidden + 8)
    for case in (*rows_cases(shape, routing, dtype, seed=seed)[:2], experts_case(shape, routing, dtype, gated=gated)):
        assert_follows_oracle(case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 600), experts=st.integers(1, 20), k=st.integers(1, 6), renormalize=st.booleans(),
    masked=st.sampled_from([0.0, 0.3, 1.0]), biased=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_gating_follows_the_oracle(tokens, experts, k, renormalize, masked, biased, seed):
    assert_follows_oracle(gating_case(tokens, experts, min(k, experts), renormalize, masked, biased, seed=seed))


SMALL, WIDE = Shape(5, 3, 4, 3, 2), torch.float64


@pytest.mark.parametrize(
    "case",
    [
        router_case((6, 5, 3), WIDE, 0.4),
        gating_case(6, 5, 2, dtype=WIDE, masked=0.3),
        gating_case(6, 5, 2, renormalize=False, dtype=WIDE),
        *rows_cases(SMALL, "dropless", WIDE),
        *(experts_case(SMALL, "capacity", WIDE, activation, seed=2) for activation in ck.ACTIVATIONS),
        experts_case(SMALL, "dropless", WIDE, "silu", gated=True, recompute="full"),
        glu_case(SMALL, "dropless", WIDE),
    ],
    ids=lambda case: case.op,
)
def test_float64_gradients_are_the_numerical_ones(case):
    given = {name: value.nan_to_num() if isinstance(value, Tensor) else value for name, value in case.arguments.items()}
    leaves = {n: v.requires_grad_() for n, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def smooth(*tensors):
        out = getattr(ck, case.op)(**(given | dict(zip(leaves, tensors, strict=True))))
        return out if isinstance(out, Tensor) else tuple(value for value in out if value.is_floating_point())

    assert torch.autograd.gradcheck(smooth, tuple(leaves.values()))


EVERY_OP = [
    router_case("odd", masked=0.4),
    gating_case(5000, 8, 2, masked=0.3),
    plan_case(30_000, 8, 2, 0.9, True, 0.2),
    *rows_cases("odd", "capacity"),
    experts_case(SHAPES["plain"]._replace(tokens=301), gated=True),
    experts_case(dtype=torch.bfloat16),
    glu_case(),
    dense_case(),
]
EACH = pytest.mark.parametrize("case", EVERY_OP, ids=lambda case: case.op)


@EACH
def test_results_depend_neither_on_the_number_of_threads_nor_on_the_run(case):
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(case))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(found[0], other)


@EACH
def test_strided_arguments_give_the_same_result(case):
    torch.testing.assert_close(results(strided(case)), results(case))


@EACH
def test_only_the_wanted_gradients_are_computed_and_they_do_not_change(case):
    whole = results(case)
    leaves = [what.removeprefix("gradient of ") for what in whole if what.startswith("gradient of ")]
    for frozen in [*([name] for name in leaves), leaves[1:]] if len(leaves) > 1 else ():
        some = results(case, frozen=frozen)
        assert_same(some, {what: value for what, value in whole.items() if what in some})
        assert some.keys() == whole.keys() - {f"gradient of {name}" for name in frozen}


@pytest.mark.parametrize("only", ["gates", "top_prob", "mean_probs", "z_loss"])
def test_each_output_of_gating_alone_has_its_gradient(only):
    assert_follows_oracle(gating_case(20, 6, 2, masked=0.3), only=only)


def test_nan_logits_never_give_an_expert_that_does_not_exist():
    assert_nan_chooses_existing_experts()


@pytest.mark.parametrize("package", [ck, ck.reference], ids=["op", "reference"])
def test_normalized_gates_sum_to_one_however_improbable_the_choice(package):
    logits = torch.tensor([[0.0, -88.0, -90.0], [0.0, -104.0, -300.0], [0.0, -104.0, -torch.inf]])
    bias = torch.tensor([0.0, 9.0, 3.0])
    assert package.topk_gating(logits, 1, True, bias).gates.tolist() == [[1.0]] * 3
    gates = package.topk_gating(logits, 2, True, bias).gates
    torch.testing.assert_close(gates[0], torch.tensor([0.0, -2.0]).softmax(-1))
    assert gates[1:].tolist() == [[1.0, 0.0]] * 2
    assert package.topk_gating(logits[2:], 1, True, torch.tensor([0.0, 0.0, 9.0])).gates.tolist() == [[0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_sums_in_float32_in_the_order_of_the_choices(dtype):
    # 1 + 2^-k twice: lost if the sum were kept in bfloat16 or float16, kept when it is rounded once at the end.
    plan = ck.dispatch(torch.tensor([[0, 1, 2]], dtype=torch.int32), 3)
    tiny = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    rows = torch.tensor([[1.0], [tiny], [tiny]], dtype=dtype)
    expected = ((torch.ones(()) + tiny) + tiny).to(dtype)
    assert ck.combine(rows, torch.ones(1, 3), plan).item() == expected.item() > 1


@compiled
@pytest.mark.parametrize(("dtype", "num_experts"), list(zip(DTYPES, (1, 3, 8), strict=True)))
def test_a_tokens_logits_do_not_depend_on_its_batch(dtype, num_experts):
    x, weight = randn(61, 200, dtype=dtype), randn(num_experts, 200)
    apart = torch.cat([ck.router_logits(token[None], weight) for token in x])
    assert torch.equal(ck.router_logits(x, weight), apart)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_halves_of_one_weight_give_the_bits_of_two_weights(swapped):
    case = glu_case()
    whole = case.arguments["gate_in_weight"]
    gate, own = whole.chunk(2, dim=1)[:: -1 if swapped else 1]
    shared = {name: case.arguments[name] for name in ("x", "gates", "plan", "out_weight", "activation")}

    def outputs(gate, own):
        experts = shared | dict(in_weight=own, in_bias=None, out_bias=None, gate_weight=gate)
        return results(Case("expert_mlp", experts, unread=case.unread))

    views, copies = outputs(gate, own), outputs(gate.contiguous(), own.contiguous())
    assert_same(views, copies)
    if not swapped:
        both = torch.cat((copies.pop("gradient of gate_weight"), copies.pop("gradient of in_weight")), dim=1)
        assert_same(results(case), copies | {"gradient of gate_in_weight": both})


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_saved_for_backward_are_arguments_and_z_alone(gated):
    case = experts_case("plain", "dropless", gated=gated)
    given = {n: v.requires_grad_() if torch.is_tensor(v) else v for n, v in case.arguments.items()}
    arguments = {t.data_ptr() for t in (*given.values(), *given["plan"]) if isinstance(t, Tensor)}

    def extra_elements(recompute):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda saved: saved
        ):
            ck.expert_mlp(**given, recompute=recompute)
        return sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in arguments)

    shape = SHAPES["plain"]
    assert extra_elements("none") == shape.tokens * shape.k * shape.hidden * (2 if gated else 1)
    assert extra_elements("full") == 0


def test_dense_mlp_refuses_to_be_differentiated():
    case = dense_case()
    case.arguments["in_weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match="dense_mlp"):
        ck.dense_mlp(**case.arguments).sum().backward()
