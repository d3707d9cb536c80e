"""Packed weights give bitwise the same results as plain ones; nothing is packed or cached implicitly."""

import pytest
import torch
from moe_cases import DTYPES, SHAPES, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels import packed_layout

MATRICES = ("in_weight", "out_weight", "gate_weight")


class Layer:
    """A call of expert_mlp with everything fixed but the weights."""

    def __init__(self, dtype=torch.float32, gated=False):
        shape = SHAPES["odd"]
        self.gates, self.plan = route(shape)
        self.x = randn(shape.tokens, shape.width, dtype=dtype, seed=1)
        if dtype == torch.float64:
            self.gates = self.gates.double()
        self.experts = make_experts(shape, dtype, "gelu", True, gated, 2)

    def __call__(self, experts=None):
        return ck.expert_mlp(self.x, self.gates, self.plan, *(experts or self.experts))

    def packed(self):
        matrices = {name: getattr(self.experts, name) for name in MATRICES}
        return self.experts._replace(**{n: None if w is None else ck.pack_weight(w) for n, w in matrices.items()})


@pytest.mark.parametrize(
    "shape", [(3, 37, 19), (37, 19), (2, 64, 32), (1, 1, 1), (2, 0, 3), (0, 5, 3), (4, 33, 0)], ids=str
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_unpacking_gives_the_weight_back(dtype, shape):
    weight = randn(*shape, dtype=dtype, seed=0)
    if weight.numel() > 8:
        weight.view(-1)[:4] = torch.tensor([float("inf"), -0.0, 1e-7, float("-inf")])
    packed = ck.pack_weight(weight)
    assert (packed.shape, packed.dtype, packed.layout) == (shape, dtype, packed_layout(dtype))
    back = ck.unpack_weight(packed)
    assert torch.equal(back, weight) and torch.equal(back.signbit(), weight.signbit())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_packed_weights_give_the_same_bits(dtype, gated):
    layer = Layer(dtype, gated)
    assert torch.equal(layer(), layer(layer.packed()))


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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_grouped_linear_and_dense_mlp_take_packed_weights(dtype):
    layer = Layer(dtype, gated=True)
    e, rows = layer.experts, ck.permute(layer.x, layer.plan)
    plain = ck.grouped_linear(rows, e.in_weight, e.in_bias, layer.plan.offsets)
    assert torch.equal(plain, ck.grouped_linear(rows, ck.pack_weight(e.in_weight), e.in_bias, layer.plan.offsets))
    first = [None if value is None else value[0] for value in (e.in_weight, e.in_bias, e.out_weight, e.out_bias)]
    first += ["gelu", e.gate_weight[0], e.gate_bias[0]]
    packed = [ck.pack_weight(v) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in first]
    assert torch.equal(ck.dense_mlp(layer.x, *first), ck.dense_mlp(layer.x, *packed))


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", ["in_weight", "out_weight", "gate_weight"])
def test_a_packed_weight_without_memory_is_refused_by_name(name, quantize):
    """As ``torch.load(prepared, map_location="meta")`` leaves it: x and the other arguments are on the CPU."""
    if quantize is not None and not ck.backend_info()["compiled"]:
        pytest.skip("int8 needs the compiled extension")
    layer = Layer(gated=True)
    e, rows = layer.experts, ck.permute(layer.x, layer.plan)
    packed = {n: ck.pack_weight(getattr(e, n), quantize) for n in MATRICES}
    one = {n: ck.pack_weight(getattr(e, n)[0], quantize) for n in MATRICES}
    for weights in (packed, one):
        weights[name] = weights[name]._replace(block=weights[name].block.to("meta"))
    with pytest.raises(ValueError, match=f"^{name} is on meta"):
        layer(e._replace(**packed))
    with pytest.raises(ValueError, match=f"^{name} is on meta"):
        ck.dense_mlp(layer.x, one["in_weight"], None, one["out_weight"], None, "gelu", one["gate_weight"])
    if name != "out_weight":  # which takes rows of another width
        with pytest.raises(ValueError, match="^weight is on meta"):
            ck.grouped_linear(rows, packed[name], None, layer.plan.offsets)


@pytest.mark.parametrize("op", ["expert_mlp", "dense_mlp", "grouped_linear"])
def test_ops_compute_with_the_weights_as_they_are_now(op):
    """Whatever was called before: an op keeps nothing of a weight, and a packed one is a copy."""
    layer = Layer()
    e, rows, packed = layer.experts, ck.permute(layer.x, layer.plan), layer.packed()

    def compute(weight):
        if op == "expert_mlp":
            return layer(e._replace(in_weight=weight))
        if op == "dense_mlp":
            return ck.dense_mlp(layer.x, weight[0], e.in_bias[0], e.out_weight[0], e.out_bias[0])
        return ck.grouped_linear(rows, weight, e.in_bias, layer.plan.offsets)

    before, whole = compute(e.in_weight), layer()
    e.in_weight.data[0, 3, 2] = 9.0
    after = compute(e.in_weight)
    assert torch.equal(after, compute(e.in_weight.clone())) and not torch.equal(after, before)
    assert torch.equal(layer(packed), whole)


@pytest.mark.parametrize("quantize", [None, "int8"] if ck.backend_info()["compiled"] else [None])
def test_packed_weights_refuse_a_gradient_at_once(quantize):
    layer = Layer()
    e, rows = layer.experts, ck.permute(layer.x, layer.plan).requires_grad_()
    packed = ck.pack_weight(e.in_weight, quantize)
    with pytest.raises(NotImplementedError, match="packed weights have no derivative"):
        ck.expert_mlp(layer.x.requires_grad_(), *(layer.gates, layer.plan), *layer.packed())
    with pytest.raises(NotImplementedError, match="packed weights have no derivative"):
        ck.grouped_linear(rows, packed, e.in_bias, layer.plan.offsets)


def cut(packed):
    return packed._replace(block=packed.block[:64])


def foreign(packed):
    return packed._replace(layout="float32x1024")


def wrong_weights():
    """What is wrong, by the argument that the error names."""
    refused = [
        ("out_weight", lambda p, e: {"out_weight": e.out_weight}),
        ("in_weight", lambda p, e: {"in_weight": e.in_weight}),
        ("in_weight", lambda p, e: {"in_weight": ck.pack_weight(e.in_weight[:, :, 1:])}),
        ("out_weight", lambda p, e: {"out_weight": ck.pack_weight(e.out_weight.mT)}),
        ("in_weight", lambda p, e: {"in_weight": ck.pack_weight(e.in_weight.double())}),
        ("in_bias", lambda p, e: {"in_bias": e.in_bias[:, 1:]}),
    ]
    if packed_layout(torch.float32) != "plain":  # else nothing is packed here
        refused += [
            ("64 of torch.uint8", lambda p, e: {"out_weight": cut(p.out_weight)}),
            ("64 of torch.uint8", lambda p, e: {"in_weight": cut(p.in_weight)}),
            ("float32x1024", lambda p, e: {"in_weight": foreign(p.in_weight), "out_weight": foreign(p.out_weight)}),
            ("out_weight", lambda p, e: {"in_weight": foreign(p.in_weight)}),
            ("out_weight", lambda p, e: {"out_weight": foreign(p.out_weight)}),
        ]
    return refused


@pytest.mark.parametrize(("named", "change"), wrong_weights())
def test_wrong_packed_weights_are_refused_by_name(named, change):
    layer = Layer()
    packed = layer.packed()
    with pytest.raises((TypeError, ValueError), match=named):
        layer(packed._replace(**change(packed, layer.experts)))


@pytest.mark.parametrize(
    "weight", [None, torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, device="meta")]
)
def test_what_cannot_be_packed_is_refused_by_name(weight):
    with pytest.raises((TypeError, ValueError), match="weight"):
        ck.pack_weight(weight)
