"""Packed weights give bitwise the same results as plain ones; nothing is packed or cached implicitly."""

import copy
import threading

import pytest
import torch
from moe_cases import DTYPES, SHAPES, make_experts, randn, route
from torch.utils.flop_counter import FlopCounterMode

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


def test_a_packed_weight_is_a_copy():
    layer = Layer()
    before, packed = layer(), layer.packed()
    layer.experts.in_weight.zero_()
    assert torch.equal(layer(packed), before)


WRITES = {
    "in place": lambda weight: weight.mul_(2),
    "through .data": lambda weight: weight.data.mul_(2),
    "one element through .data": lambda weight: weight.data[0, 3].__setitem__(2, 9.0),
    "one row through numpy": lambda weight: weight.numpy()[1, 5].fill(3.0),
    "a new storage": lambda weight: setattr(weight, "data", weight.data * 2),
    "swapped": lambda weight: torch.utils.swap_tensors(weight, weight * 2),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("op", ["expert_mlp", "dense_mlp", "grouped_linear"])
def test_ops_compute_with_the_weights_as_they_are_now(op, write):
    """Whatever was called before: an op keeps nothing of a weight."""
    layer = Layer()
    e = layer.experts
    rows = ck.permute(layer.x, layer.plan)

    def compute(weight):
        if op == "expert_mlp":
            return layer(e._replace(in_weight=weight))
        if op == "dense_mlp":
            return ck.dense_mlp(layer.x, weight[0], e.in_bias[0], e.out_weight[0], e.out_bias[0])
        return ck.grouped_linear(rows, weight, e.in_bias, layer.plan.offsets)

    before = [compute(e.in_weight) for _ in range(3)][-1]
    WRITES[write](e.in_weight)
    after = compute(e.in_weight)
    assert torch.equal(after, compute(e.in_weight.clone()))
    if write != "one row through numpy" or op != "dense_mlp":  # dense_mlp sees expert 0 alone
        assert not torch.equal(after, before)


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_threads_that_share_weights_get_the_same_results(form):
    layer = Layer()
    experts = layer.experts if form == "plain" else layer.packed()
    expected = layer()
    wrong = []
    for _ in range(20):
        fresh = experts if form == "packed" else copy.deepcopy(experts)
        barrier = threading.Barrier(4)

        def run(fresh=fresh, barrier=barrier):
            barrier.wait()
            wrong.extend(1 for _ in range(5) if not torch.equal(layer(fresh), expected))

        threads = [threading.Thread(target=run) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong


def test_packed_weights_refuse_a_gradient_at_once():
    layer = Layer()
    packed = layer.packed()
    layer.x.requires_grad_()
    with pytest.raises(NotImplementedError, match="packed weights have no derivative.*no_grad"):
        layer(packed)
    rows = ck.permute(layer.x, layer.plan)
    with pytest.raises(NotImplementedError, match="packed weights have no derivative"):
        ck.grouped_linear(rows, packed.in_weight, packed.in_bias, layer.plan.offsets)
    with torch.no_grad():
        assert torch.equal(layer(packed), layer())


def test_packed_weights_are_no_tensors():
    packed = ck.pack_weight(torch.ones(2, 3, 4))
    for name in ("data", "mul_", "grad", "numpy", "requires_grad"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'.*unpack_weight"):
            getattr(packed, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, e: p._replace(out_weight=e.out_weight),
            "out_weight must be packed like the other weights, got Tensor",
        ),
        (
            lambda p, e: p._replace(in_weight=e.in_weight),
            "out_weight.*tensor, got PackedWeight|in_weight must be packed",
        ),
        (lambda p, e: p._replace(in_weight=ck.pack_weight(e.in_weight[:, :, 1:])), "in_weight must be packed from"),
        (lambda p, e: p._replace(out_weight=ck.pack_weight(e.out_weight.mT)), "out_weight must be packed from"),
        (lambda p, e: p._replace(in_weight=ck.pack_weight(e.in_weight.double())), "in_weight is float64"),
        (lambda p, e: p._replace(in_bias=e.in_bias[:, 1:]), "in_bias"),
    ],
)
def test_wrong_packed_weights_are_refused_by_name(change, message):
    layer = Layer()
    with pytest.raises((TypeError, ValueError), match=message):
        layer(change(layer.packed(), layer.experts))


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


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (None, "weight must be a tensor, got NoneType"),
        (torch.zeros(3), r"weight must have shape \[E, O, I\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "weight must be float32"),
        (torch.zeros(2, 3, device="meta"), "weight is on meta; weights are packed for CPUs"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(weight, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ck.pack_weight(weight)


@pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")
def test_a_weight_packed_for_other_kernels_is_refused():
    layer = Layer()
    packed = layer.packed()
    foreign = {name: getattr(packed, name)._replace(layout="float32x1024") for name in ("in_weight", "out_weight")}
    with pytest.raises(ValueError, match="packed as float32x1024.*pack the weight again"):
        layer(packed._replace(**foreign))
    for name, weight in foreign.items():
        with pytest.raises(ValueError, match="out_weight is packed as .* and in_weight as .*; pack both"):
            layer(packed._replace(**{name: weight}))


@pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")
def test_a_packed_weight_that_ends_early_is_refused_before_it_is_read():
    layer = Layer()
    packed = layer.packed()
    cut = packed.out_weight._replace(block=packed.out_weight.block[:64])
    with pytest.raises(ValueError, match="takes .* bytes, got 64 of torch.uint8"):
        layer(packed._replace(out_weight=cut))
    rows = ck.permute(layer.x, layer.plan)
    cut = packed.in_weight._replace(block=packed.in_weight.block[:64])
    with pytest.raises(ValueError, match="takes .* bytes, got 64 of torch.uint8"):
        ck.grouped_linear(rows, cut, packed.in_bias, layer.plan.offsets)


@pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")
def test_their_flops_are_those_of_plain_weights():
    layer = Layer()
    packed = layer.packed()
    counts = []
    for experts in (layer.experts, packed):
        with FlopCounterMode(display=False) as counter:
            layer(experts)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiled_code_takes_them():
    layer = Layer()
    packed = layer.packed()
    run = torch.compile(lambda x: ck.expert_mlp(x, layer.gates, layer.plan, *packed), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(run(layer.x), layer())
