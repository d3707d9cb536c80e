"""The op of a whole sparse layer gives bitwise the results of the single ops."""

import pytest
import torch
from moe_cases import DTYPES, SHAPES, covering, make_experts, randn, seeded
from torch.utils.flop_counter import FlopCounterMode

import clipup_kernels as ck
from clipup_kernels import packed_layout
from clipup_kernels.ops.sparse_mlp import is_one_op, packed_sparse_mlp

pytestmark = pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")

MATRICES = ("in_weight", "out_weight", "gate_weight")


class Layer:
    def __init__(self, shape="odd", dtype=torch.float32, gated=False, bias=True, quantize=None):
        self.shape = SHAPES[shape]
        tokens, width, _, experts, _ = self.shape
        self.x = randn(tokens, width, dtype=dtype, seed=1)
        self.router = randn(experts, width, seed=2)
        plain = make_experts(self.shape, dtype, "gelu", bias, gated, seed=3)
        packed = {n: None if (w := getattr(plain, n)) is None else ck.pack_weight(w, quantize) for n in MATRICES}
        self.experts = plain._replace(**packed)

    def one_op(self, **options):
        y, routing = packed_sparse_mlp(self.x, self.router, self.shape.k, *self.experts, **options)
        return y, *routing.unpack()

    def single_ops(
        self, renormalize=True, capacity_factor=None, by_priority=False, gate_scale=1.0, selection_bias=None, mask=None
    ):
        logits = ck.router_logits(self.x, self.router, mask)
        gating = ck.topk_gating(logits, self.shape.k, renormalize, selection_bias, mask)
        priority = gating.top_prob if by_priority else None
        plan = ck.dispatch(gating.expert_indices, self.shape.experts, capacity_factor, priority, mask)
        y = ck.expert_mlp(self.x, gate_scale * gating.gates, plan, *self.experts)
        return y, logits, gating, plan


def assert_same(one, single):
    assert torch.equal(one[0], single[0])
    assert torch.equal(one[1], single[1])
    for got, wanted in zip((*one[2], *one[3]), (*single[2], *single[3]), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": False},
        {"capacity_factor": 0.5},
        {"capacity_factor": 0.5, "by_priority": True},
        {"gate_scale": 4.0},
        {"gate_scale": 0.5, "capacity_factor": 1},
        {"selection_bias": randn(5, seed=9)},
        {"mask": torch.rand(37, generator=seeded(7)) < 0.6, "capacity_factor": 0.7},
        {"mask": torch.zeros(37, dtype=torch.bool)},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_option_means_what_it_means_in_the_single_ops(gated, options):
    layer = Layer(gated=gated, bias=not gated)
    assert_same(layer.one_op(**options), layer.single_ops(**options))


@pytest.mark.parametrize("case", covering(dtype=DTYPES, quantize=(None, "int8"), shape=SHAPES))
def test_it_gives_the_bits_of_the_single_ops(case):
    layer = Layer(**case)
    if not is_one_op(layer.experts.in_weight):
        pytest.skip("this CPU multiplies experts of this type in AMX tiles, by single ops")
    assert_same(layer.one_op(), layer.single_ops())


def test_masked_tokens_are_not_read():
    layer = Layer()
    mask = torch.arange(37) % 3 > 0
    wanted = layer.one_op(mask=mask)
    layer.x[~mask] = float("nan")
    assert_same(layer.one_op(mask=mask), wanted)


def on_meta(packed):
    return packed._replace(block=packed.block.to("meta"))


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("x", lambda a: a["x"][:, 1:]),
        ("x", lambda a: a["x"].double()),
        ("x", lambda a: a["x"].to("meta")),
        ("x", lambda a: a["x"].to_sparse()),
        ("router_weight", lambda a: a["router_weight"][1:]),
        ("in_bias", lambda a: a["in_bias"][:, 1:]),
        ("out_bias", lambda a: a["out_bias"][1:]),
        ("mask", lambda a: torch.ones(36, dtype=torch.bool)),
        ("mask", lambda a: torch.ones(37)),
        ("mask", lambda a: torch.ones(37, dtype=torch.bool, device="meta")),
        ("selection_bias", lambda a: torch.zeros(4)),
        ("in_weight", lambda a: on_meta(a["in_weight"])),
        ("out_weight", lambda a: on_meta(a["out_weight"])),
        ("out_weight", lambda a: a["out_weight"]._replace(block=a["out_weight"].block[:64])),
        ("k", lambda a: 6),
        ("capacity_factor", lambda a: 0.0),
    ],
)
def test_wrong_arguments_are_refused(named, change):
    layer = Layer()
    arguments = {"x": layer.x, "router_weight": layer.router, "k": 3, **layer.experts._asdict()}
    arguments[named] = change(arguments)
    with pytest.raises((TypeError, ValueError)):
        packed_sparse_mlp(**arguments)


def test_it_has_no_derivative():
    layer = Layer()
    layer.router.requires_grad_()
    with pytest.raises(NotImplementedError, match="packed weights have no derivative"):
        layer.one_op()


def test_its_flops_are_those_of_the_single_ops():
    layer, counts = Layer(), []
    for run in (layer.one_op, layer.single_ops):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
