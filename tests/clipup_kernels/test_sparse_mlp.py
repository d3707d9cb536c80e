"""The op of a whole sparse layer gives bitwise the results of the single ops."""

import pytest
import torch
from moe_cases import DTYPES, SHAPES, assert_same, make_experts, pairwise, randn, seeded
from torch.utils.flop_counter import FlopCounterMode

import clipup_kernels as ck
from clipup_kernels import packed_layout
from clipup_kernels.ops.sparse_mlp import is_one_op, packed_sparse_mlp

pytestmark = pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")


class Layer:
    def __init__(self, shape="odd", dtype=torch.float32, gated=False, bias=True, quantize=None):
        self.shape = SHAPES[shape]
        self.x = randn(self.shape.tokens, self.shape.width, dtype=dtype, seed=1)
        self.router = randn(self.shape.experts, self.shape.width, seed=2)
        plain = make_experts(self.shape, dtype, "gelu", bias, gated, seed=3)
        matrices = {name: getattr(plain, name) for name in ("in_weight", "out_weight", "gate_weight")}
        packed = {name: None if w is None else ck.pack_weight(w, quantize) for name, w in matrices.items()}
        self.experts = plain._replace(**packed)

    def one_op(self, **options):
        y, routing = packed_sparse_mlp(self.x, self.router, self.shape.k, *self.experts, **options)
        logits, gating, plan = routing.unpack()
        return y, logits, *gating, *plan

    def single_ops(
        self, renormalize=True, capacity_factor=None, by_priority=False, gate_scale=1.0, selection_bias=None, mask=None
    ):
        logits = ck.router_logits(self.x, self.router, mask)
        gating = ck.topk_gating(logits, self.shape.k, renormalize, selection_bias, mask)
        priority = gating.top_prob if by_priority else None
        plan = ck.dispatch(gating.expert_indices, self.shape.experts, capacity_factor, priority, mask)
        y = ck.expert_mlp(self.x, gate_scale * gating.gates, plan, *self.experts)
        return y, logits, *gating, *plan


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": False, "capacity_factor": 0.5},
        {"capacity_factor": 0.5, "by_priority": True},
        {"gate_scale": 0.5, "capacity_factor": 1},
        {"selection_bias": randn(5, seed=9)},
        {"mask": torch.rand(37, generator=seeded(7)) < 0.6, "capacity_factor": 0.7},
        {"mask": torch.zeros(37, dtype=torch.bool)},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_option_of_the_fused_layer_gives_the_bits_of_the_single_ops(gated, options):
    layer = Layer(gated=gated, bias=not gated)
    wanted = layer.single_ops(**options)
    if "mask" in options:
        layer.x[~options["mask"]] = torch.nan  # masked tokens are not read
    assert_same(layer.one_op(**options), wanted)


@pytest.mark.parametrize("case", pairwise(dtype=DTYPES, quantize=(None, "int8"), shape=SHAPES))
def test_the_fused_layer_gives_the_bits_of_the_single_ops(case):
    layer = Layer(**case)
    if not is_one_op(layer.experts.in_weight):
        pytest.skip("this CPU multiplies experts of this type in AMX tiles, by single ops")
    assert_same(layer.one_op(), layer.single_ops())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x[:, 1:]),
        ("x", lambda x: x.double()),
        ("x", lambda x: x.to("meta")),
        ("x", lambda x: x.to_sparse()),
        ("router_weight", lambda weight: weight[1:]),
        ("in_bias", lambda bias: bias[:, 1:]),
        ("out_bias", lambda bias: bias[1:]),
        ("mask", lambda _: torch.ones(36, dtype=torch.bool)),
        ("selection_bias", lambda _: torch.zeros(4)),
        ("in_weight", lambda packed: packed._replace(block=packed.block.to("meta"))),
        ("out_weight", lambda packed: packed._replace(block=packed.block[:64])),
        ("k", lambda _: 6),
        ("capacity_factor", lambda _: 0.0),
    ],
)
def test_wrong_arguments_are_refused(name, change):
    layer = Layer()
    arguments = {"x": layer.x, "router_weight": layer.router, "k": 3, **layer.experts._asdict()}
    with pytest.raises((TypeError, ValueError)):
        packed_sparse_mlp(**arguments | {name: change(arguments.get(name))})


def test_the_fused_layer_has_no_derivative_and_the_flops_of_the_single_ops():
    layer, counts = Layer(), []
    for run in (layer.one_op, layer.single_ops):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    layer.router.requires_grad_()
    with pytest.raises(NotImplementedError, match="packed weights"):
        layer.one_op()
