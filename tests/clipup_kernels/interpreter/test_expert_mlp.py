"""The fused expert MLP on Triton's kernels, interpreted: y, z and every gradient against the oracle in float64.

In float32 and float16: the interpreter's bfloat16 is wrong.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import (
    ROUTINGS,
    SHAPES,
    Experts,
    Shape,
    assert_follows,
    double,
    make_experts,
    outputs_and_gradients,
    randn,
    route,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from clipup_kernels import ACTIVATIONS, Plan, reference
from clipup_kernels.backends import torch_eager
from clipup_kernels.triton import configs
from clipup_kernels.triton.expert_mlp import expert_mlp_forward
from clipup_kernels.triton.expert_mlp_backward import expert_mlp_backward

pytestmark = pytest.mark.interpreter

SEVERAL_TILES = {
    "half": Shape(210, 80, 140, 3, 2),
    "tf32": Shape(120, 40, 100, 3, 2),
    "ieee": Shape(120, 40, 100, 3, 2),
}
GRADIENTS = ("x", "gates", "in_weight", "in_bias", "out_weight", "out_bias", "gate_weight", "gate_bias")


def parameters(experts: Experts) -> tuple[Tensor | None, ...]:
    return (*experts[:4], *experts[5:])


def forward(x, gates, plan, experts: Experts, keep_z=True):
    return expert_mlp_forward(x, gates, *plan, *parameters(experts), experts.activation, keep_z)


def backward(dy, x, gates, plan, experts: Experts, z, wanted=(True,) * 4) -> dict[str, Tensor]:
    gradients = expert_mlp_backward(dy, x, gates, *plan, *parameters(experts), z, experts.activation, list(wanted))
    return dict(zip(GRADIENTS, gradients, strict=True))


def oracle(dy, x, gates, plan, experts: Experts) -> dict[str, Tensor]:
    """y, z and every gradient in float64; parameters that are absent have no elements."""
    x, gates, experts = double((x, gates, experts))
    wanted = outputs_and_gradients(reference.expert_mlp, x, gates, plan, experts, dy)
    _, z = torch_eager.expert_mlp_forward(x, gates, *plan, *parameters(experts), experts.activation, True)
    gradients = {name: wanted.get(f"gradient of {name}", torch.empty(0)) for name in GRADIENTS}
    return {"y": wanted["y"], "z": z} | gradients


def case(shape, routing="capacity", dtype=torch.float32, activation="gelu", bias=True, gated=False, seed=0):
    gates, plan = route(shape, routing, seed)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 10)
    dy = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 11)
    return dy, x, gates, plan, make_experts(shape, dtype, activation, bias, gated, seed + 20)


def assert_follows_oracle(shape, routing="capacity", dtype=torch.float32, **form):
    assert_experts_follow_oracle(*case(shape, routing, dtype, **form))


def assert_experts_follow_oracle(dy, x, gates, plan, experts):
    dtype = x.dtype
    y, z = forward(x, gates, plan, experts)
    ours = {"y": y, "z": z} | backward(dy, x, gates, plan, experts, z)
    for what, want in oracle(dy, x, gates, plan, experts).items():
        assert_follows(ours[what], want, dtype, what)
        assert ours[what].dtype == (torch.float32 if what == "gates" else dtype), what


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_follows_the_oracle(shape):
    assert_follows_oracle(shape, "capacity" if shape.tokens > 1 else "dropless", torch.float16)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_follows_the_oracle(routing):
    assert_follows_oracle(SHAPES["odd"], routing, gated=True)


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form_of_expert_follows_the_oracle(activation, bias, gated):
    assert_follows_oracle(SHAPES["odd"], activation=activation, bias=bias, gated=gated)


@pytest.mark.parametrize("absent", ["in_bias", "gate_bias"])
def test_gated_experts_with_one_of_two_biases_follow_the_oracle(absent):
    *arguments, experts = case(SHAPES["odd"], activation="silu", gated=True)
    assert_experts_follow_oracle(*arguments, experts._replace(**{absent: None}))


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", [pytest.param("half", marks=pytest.mark.slow), "tf32", "ieee"])
def test_tiles_fit_together_along_rows_columns_and_terms(monkeypatch, kind, gated):
    monkeypatch.setattr(configs, "arithmetic", lambda dtype: kind)
    dtype, shape = torch.float16 if kind == "half" else torch.float32, SEVERAL_TILES[kind]
    rows = shape.tokens * shape.k
    tile = configs.choose("project_in", torch.device("cpu"), dtype, rows, shape.experts, shape.width, shape.hidden)
    assert tile.block_m < rows / shape.experts and tile.block_n < shape.hidden and tile.block_k < shape.width
    assert_follows_oracle(shape, "dropless", dtype, gated=gated)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu"])
def test_wide_tiles_whose_epilogue_has_sixteen_parts_follow_the_oracle(activation):
    assert_follows_oracle(Shape(80, 64, 160, 2, 2), dtype=torch.float16, activation=activation)


@pytest.fixture
def by_descriptors(monkeypatch):
    """Makes every launch load weights by descriptors, or rows too; the fixture's value lists the tiles."""

    def load(rows_too):
        choose = configs.choose

        def chosen(kernel, *which):
            tile = choose(kernel, *which)
            if tile is None:
                return None
            tile = tile._replace(block_k=32)
            tiles.append(([tile] + configs.with_descriptors(kernel, tile))[-1 if rows_too else -2])
            return tiles[-1]

        monkeypatch.setattr(configs, "choose", chosen)
        return tiles

    tiles: list[configs.Config] = []
    return load


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [Shape(80, 64, 256, 2, 2), Shape(80, 64, 160, 2, 2)], ids=["even", "uneven"])
@pytest.mark.parametrize("rows_too", [pytest.param(False, marks=pytest.mark.slow), True], ids=["weights", "rows"])
def test_operands_read_by_descriptors_follow_the_oracle(by_descriptors, rows_too, shape, gated):
    tiles = by_descriptors(rows_too)
    assert_follows_oracle(shape, dtype=torch.float16, gated=gated)
    assert sum(tile.descriptors for tile in tiles) == 4
    assert sum(tile.row_descriptors for tile in tiles) == (5 if rows_too else 0)


@pytest.mark.parametrize("wanted", [(True, True, True, False), (False, False, False, True)], ids=["in", "out"])
def test_one_weights_gradient_from_rows_read_by_descriptors_follows_the_oracle(by_descriptors, wanted):
    dy, x, gates, plan, experts = case(Shape(80, 64, 160, 2, 2), dtype=torch.float16)
    want = oracle(dy, x, gates, plan, experts)
    by_descriptors(rows_too=True)
    _, z = forward(x, gates, plan, experts)
    for name, gradient in backward(dy, x, gates, plan, experts, z, wanted).items():
        if gradient.numel():
            assert_follows(gradient, want[name], torch.float16, name)


@pytest.fixture
def descriptors_made(monkeypatch):
    made, make = [], TensorDescriptor.from_tensor
    monkeypatch.setattr(
        TensorDescriptor, "from_tensor", lambda tensor, block: made.append(tensor) or make(tensor, block)
    )
    return made


def test_operands_that_no_descriptor_can_serve_are_read_by_pointers(by_descriptors, descriptors_made):
    tiles = by_descriptors(rows_too=True)
    assert_follows_oracle(SHAPES["odd"], gated=True)
    assert all(tile.row_descriptors for tile in tiles) and not descriptors_made


def off_by_an_element(tensor):
    """The same values, from memory that is not on a multiple of 16 bytes."""
    moved = torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    return moved


def test_weights_and_rows_on_odd_addresses_are_read_by_pointers(by_descriptors, descriptors_made):
    by_descriptors(rows_too=True)
    dy, x, gates, plan, experts = case(Shape(80, 64, 160, 2, 2), dtype=torch.float16)
    odd = experts._replace(in_weight=off_by_an_element(experts.in_weight))
    y, z = forward(x, gates, plan, experts)
    before = len(descriptors_made)
    odd_y, odd_z = forward(off_by_an_element(x), gates, plan, odd)
    assert torch.equal(odd_y, y) and torch.equal(odd_z, z)
    assert len(descriptors_made) == before + before // 2, "those of the second product"


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_rows_give_gradients_of_0_whatever_the_config(by_descriptors, gated):
    by_descriptors(rows_too=True)
    dy, x, gates, plan, experts = case(Shape(0, 64, 160, 2, 2), dtype=torch.float16, gated=gated)
    y, z = forward(x, gates, plan, experts)
    for wanted in ((True,) * 4, (False, False, True, False), (False, False, False, True)):
        for name, gradient in backward(dy, x, gates, plan, experts, z, wanted).items():
            assert not gradient.any(), name


@pytest.mark.parametrize("rows_too", [None, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("keep_z", [True, False])
def test_the_halves_of_one_weight_are_read_where_they_are(by_descriptors, descriptors_made, rows_too, keep_z):
    if rows_too:
        by_descriptors(rows_too)
    shape = Shape(80, 64, 160, 3, 2)
    dy, x, gates, plan, experts = case(shape, dtype=torch.float16, gated=True, bias=False)
    whole = torch.cat((experts.gate_weight, experts.in_weight), dim=1)
    gate_half, in_half = whole.chunk(2, dim=1)
    halves = experts._replace(in_weight=in_half, gate_weight=gate_half)

    copies = CopiesOf((3, 160, 64))
    with copies:
        y, z = forward(x, gates, plan, halves, keep_z)
        gradients = backward(dy, x, gates, plan, halves, z)

    assert copies.seen == 0 and bool(descriptors_made) == bool(rows_too)
    wanted_y, wanted_z = forward(x, gates, plan, experts, keep_z)
    assert torch.equal(y, wanted_y) and torch.equal(z, wanted_z)
    for name, gradient in backward(dy, x, gates, plan, experts, wanted_z).items():
        assert torch.equal(gradients[name], gradient), name


class CopiesOf(TorchDispatchMode):
    """Counts the ops that copy a tensor of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.seen = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and args[0].shape == self.shape:
            self.seen += 1
        return func(*args, **(kwargs or {}))


def test_copies_of_weights_are_seen():
    with CopiesOf((3, 4, 5)) as copies:
        torch.zeros(3, 8, 5)[:, :4].contiguous()
    assert copies.seen == 1


def test_a_weight_whose_memory_was_freed_is_named():
    _, x, gates, plan, experts = case(SHAPES["odd"])
    experts.in_weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(5, 53, 19\) has no memory: its storage was freed, as FSDP does"):
        forward(x, gates, plan, experts)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda t, d, h, e, k: Shape(t, d, h, e, min(k, e)),
        st.integers(0, 120), st.integers(1, 90), st.integers(1, 90), st.integers(1, 9), st.integers(1, 4),
    ),
    routing=st.sampled_from(ROUTINGS), gated=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_routing_follows_the_oracle(shape, routing, gated, seed):
    assert_follows_oracle(shape, routing, gated=gated, seed=seed)


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "gated"])
def test_a_recomputed_z_gives_bitwise_the_same_gradients(gated):
    dy, x, gates, plan, experts = case(SHAPES["odd"], dtype=torch.float16, gated=gated)
    y, z = forward(x, gates, plan, experts)
    inferred, nothing = forward(x, gates, plan, experts, keep_z=False)
    assert torch.equal(y, inferred) and nothing.numel() == 0
    kept, again = (backward(dy, x, gates, plan, experts, pre) for pre in (z, nothing))
    for name in GRADIENTS:
        assert torch.equal(kept[name], again[name]), name


@pytest.mark.parametrize("rows_too", [False, True], ids=["pointers", "descriptors"])
def test_what_lies_in_empty_rows_and_in_tokens_without_a_row_has_no_effect(by_descriptors, rows_too, poisoned_memory):
    if rows_too:
        by_descriptors(rows_too)
    dy, x, gates, plan, experts = case(SHAPES["plain"], "masked")
    nowhere, filled = (plan.row_of_choice < 0).all(1), int(plan.offsets[-1])
    assert 0 < nowhere.sum() < len(nowhere) and filled < len(plan.choice_of_row)
    y, z = forward(x, gates, plan, experts)
    clean = backward(dy, x, gates, plan, experts, z)
    assert (y[nowhere] == 0).all() and (z[filled:] == 0).all()
    x[nowhere], dy[nowhere], gates[nowhere], z[filled:] = (torch.nan,) * 4
    assert torch.equal(forward(x, gates, plan, experts)[0], y)
    for name, gradient in backward(dy, x, gates, plan, experts, z).items():
        assert torch.equal(gradient, clean[name]), name
    assert (clean["x"][nowhere] == 0).all() and (clean["gates"][nowhere] == 0).all()


def test_experts_without_a_row_get_zero_gradients():
    dy, x, gates, plan, experts = case(SHAPES["plain"]._replace(experts=4), "dropless")
    experts = make_experts(SHAPES["plain"])
    plan = Plan(torch.cat([plan.offsets, plan.offsets[-1:].expand(4)]), *plan[1:])
    _, z = forward(x, gates, plan, experts)
    gradients = backward(dy, x, gates, plan, experts, z)
    for name in ("in_weight", "in_bias", "out_weight", "out_bias"):
        assert (gradients[name][4:] == 0).all() and (gradients[name][:4] != 0).any()


def test_only_the_wanted_gradients_are_computed_and_they_do_not_change():
    """Those of both sides' parameters are one launch with tiles of its own: alone, their sums may round otherwise."""
    dy, x, gates, plan, experts = case(SHAPES["odd"], gated=True)
    _, z = forward(x, gates, plan, experts)
    full = backward(dy, x, gates, plan, experts, z)
    groups = (("x",), ("gates",), ("in_weight", "in_bias", "gate_weight", "gate_bias"), ("out_weight", "out_bias"))
    for wanted in range(4):
        some = backward(dy, x, gates, plan, experts, z, [place == wanted for place in range(4)])
        for place, names in enumerate(groups):
            for name in names:
                if place == wanted and name in ("x", "gates"):
                    assert torch.equal(some[name], full[name]), name
                elif place == wanted:
                    torch.testing.assert_close(
                        some[name], full[name], rtol=1e-5, atol=1e-6 * float(full[name].abs().max())
                    )
                else:
                    assert some[name].numel() == 0, name


def test_strided_arguments_are_read_as_they_are_indexed():
    dy, x, gates, plan, experts = case(SHAPES["odd"])
    y, z = forward(x, gates, plan, experts)
    strided = experts._replace(
        in_weight=experts.in_weight.mT.contiguous().mT, out_weight=experts.out_weight.mT.contiguous().mT
    )
    spread = torch.stack([x, x], -1)[..., 0]
    assert not spread.is_contiguous() and not strided.in_weight.is_contiguous()
    assert torch.equal(forward(spread, gates.mT.contiguous().mT, plan, strided)[0], y)
    expanded = dy[:1].expand_as(dy)
    want = backward(expanded.contiguous(), x, gates, plan, experts, z)
    for name, gradient in backward(expanded, spread, gates, plan, strided, z).items():
        assert torch.equal(gradient, want[name]), name


def test_a_view_in_memory_that_was_freed_is_named():
    """Such as a parameter in FSDP's flat one."""
    _, x, gates, plan, experts = case(SHAPES["odd"])
    flat = torch.cat((torch.zeros(8), experts.in_weight.flatten()))
    experts = experts._replace(in_weight=flat[8:].view(experts.in_weight.shape))
    flat.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory: its storage was freed"):
        forward(x, gates, plan, experts)


@pytest.mark.parametrize("rows_too", [None, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("width", "hidden"), [(0, 16), (16, 0)])
def test_biases_of_experts_without_a_width_have_their_gradients(by_descriptors, rows_too, gated, width, hidden):
    if rows_too:
        by_descriptors(rows_too)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert_follows_oracle(Shape(20, width, hidden, 2, 2), gated=gated)
