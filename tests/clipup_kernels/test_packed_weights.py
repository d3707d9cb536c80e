"""Packed weights give bitwise the same results as plain ones; nothing is packed or cached implicitly."""

import pytest
import torch
from moe_cases import DTYPES, Case, assert_same, dense_case, experts_case, pairwise, randn, results, rows_cases

import clipup_kernels as ck
from clipup_kernels import packed_layout

MATRICES = ("weight", "in_weight", "out_weight", "gate_weight")
ALL = (*DTYPES, torch.float64)


def packed(case: Case, quantize=None, only=MATRICES) -> Case:
    """The call with packed weights, for inference."""
    weights = {name: case.arguments.get(name) for name in only}
    blocks = {name: ck.pack_weight(w, quantize) for name, w in weights.items() if w is not None}
    return case._replace(arguments=case.arguments | blocks)


def infer(case: Case) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return results(case, frozen=case.arguments)


@pytest.mark.parametrize(
    "shape", [(3, 37, 19), (37, 19), (2, 64, 32), (1, 1, 1), (2, 0, 3), (0, 5, 3), (4, 33, 0)], ids=str
)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_unpacking_gives_the_weight_back(dtype, shape):
    weight = randn(*shape, dtype=dtype, seed=0)
    if weight.numel() > 8:
        weight.view(-1)[:4] = torch.tensor([float("inf"), -0.0, 1e-7, float("-inf")])
    one = ck.pack_weight(weight)
    assert (one.shape, one.dtype, one.layout) == (shape, dtype, packed_layout(dtype))
    back = ck.unpack_weight(one)
    assert torch.equal(back, weight) and torch.equal(back.signbit(), weight.signbit())


@pytest.mark.parametrize("form", pairwise(dtype=ALL, gated=(False, True), bias=(False, True)))
def test_packed_weights_give_the_same_bits(form):
    for case in (experts_case("odd", "dropless", **form), dense_case(**form)):
        assert_same(infer(packed(case)), infer(case))


@pytest.mark.parametrize("rows", [1, 13, 16, 42, 43, 64, 98, 99])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_same_bits_with_few_rows_an_expert(dtype, rows):
    """A plain weight is packed in steps whose size depends on the number of rows."""
    offsets = torch.tensor([0, 0, rows, rows + 3, rows + 3], dtype=torch.int32)
    for out_features, in_features in ((67, 403), (130, 209)):
        x = randn(rows + 3, in_features, dtype=dtype, seed=0)
        weight = randn(4, out_features, in_features, dtype=dtype, seed=1)
        bias = randn(4, out_features, dtype=dtype, seed=2)
        plain = ck.grouped_linear(x, weight, bias, offsets)
        assert torch.equal(plain, ck.grouped_linear(x, ck.pack_weight(weight), bias, offsets))


def calls(gated=True):
    return experts_case("odd", "dropless", gated=gated), dense_case(gated=gated), rows_cases("odd", "dropless")[2]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("quantize", [None, "int8"] if ck.backend_info()["compiled"] else [None])
def test_a_packed_weight_without_memory_is_refused_by_name(name, quantize):
    """As ``torch.load(prepared, map_location="meta")`` leaves it: x and the other arguments are on the CPU."""
    for case in calls():
        if name in case.arguments:
            on_cpu = packed(case, quantize)
            absent = on_cpu.arguments[name]._replace(block=on_cpu.arguments[name].block.to("meta"))
            with pytest.raises(ValueError, match=f"^{name} is on meta"):
                getattr(ck, case.op)(**on_cpu.arguments | {name: absent})


@pytest.mark.parametrize("quantize", [None, "int8"] if ck.backend_info()["compiled"] else [None])
def test_packed_weights_refuse_a_gradient_at_once(quantize):
    for case in calls()[::2]:
        with pytest.raises(NotImplementedError, match="packed weights have no derivative"):
            results(packed(case, quantize))


def wrong_weights():
    """What is wrong, by the argument that the error names."""
    refused = [
        ("out_weight", lambda p, e: {"out_weight": e["out_weight"]}),
        ("in_weight", lambda p, e: {"in_weight": ck.pack_weight(e["in_weight"][:, :, 1:])}),
        ("in_weight", lambda p, e: {"in_weight": ck.pack_weight(e["in_weight"].double())}),
        ("in_bias", lambda p, e: {"in_bias": e["in_bias"][:, 1:]}),
    ]
    if packed_layout(torch.float32) != "plain":  # else nothing is packed here
        names = ("in_weight", "out_weight")
        foreign = {"layout": "float32x1024"}
        refused += [
            ("64 of torch.uint8", lambda p, e: {"in_weight": p["in_weight"]._replace(block=p["in_weight"].block[:64])}),
            ("float32x1024", lambda p, e: {name: p[name]._replace(**foreign) for name in names}),
            ("out_weight", lambda p, e: {"out_weight": p["out_weight"]._replace(**foreign)}),
        ]
    return refused


@pytest.mark.parametrize(("named", "change"), wrong_weights())
def test_wrong_packed_weights_are_refused_by_name(named, change):
    case = experts_case("odd", "dropless")
    whole = packed(case).arguments
    with pytest.raises((TypeError, ValueError), match=named):
        ck.expert_mlp(**whole | change(whole, case.arguments))


@pytest.mark.parametrize(
    "weight", [None, torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, device="meta")]
)
def test_what_cannot_be_packed_is_refused_by_name(weight):
    with pytest.raises((TypeError, ValueError), match="weight"):
        ck.pack_weight(weight)
