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
    pairwise,
    randn,
    route,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from clipup_kernels import ACTIVATIONS, reference
from clipup_kernels.backends import torch_eager
from clipup_kernels.triton import configs
from clipup_kernels.triton.expert_mlp import expert_mlp_forward
from clipup_kernels.triton.expert_mlp_backward import expert_mlp_backward

pytestmark = pytest.mark.interpreter

SIZES = {name: SHAPES[name] for name in ("odd", "one_token", "no_token", "one_expert")}
SIZES |= {"even": Shape(24, 32, 64, 4, 2), "more_experts_than_rows": Shape(3, 16, 24, 12, 2)}
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


class CopiesOf(TorchDispatchMode):
    """Counts the ops that copy a tensor of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.seen = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and args[0].shape == self.shape:
            self.seen += 1
        return func(*args, **(kwargs or {}))


def test_a_weight_whose_memory_was_freed_is_named():
    _, x, gates, plan, experts = case(SHAPES["odd"])
    experts.in_weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(5, 53, 19\) has no memory: its storage was freed, as FSDP does"):
        forward(x, gates, plan, experts)


@pytest.mark.parametrize(
    "form",
    pairwise(
        shape=SIZES, routing=("dropless", "capacity", "masked", "all_dropped", "one_expert_takes_all"),
        activation=ACTIVATIONS, dtype=(torch.float32, torch.float16),
        bias=(True, False), gated=(False, True),
    ),
    ids=lambda form: "-".join(map(str, form.values())),
)  # fmt: skip
def test_y_z_and_every_gradient_follow_the_oracle(form):
    form = dict(form)
    assert_follows_oracle(SIZES[form.pop("shape")], **form)


@pytest.mark.parametrize("absent", ["in_bias", "gate_bias"])
def test_gated_experts_with_one_of_two_biases_follow_the_oracle(absent):
    *arguments, experts = case(SHAPES["odd"], activation="silu", gated=True)
    assert_experts_follow_oracle(*arguments, experts._replace(**{absent: None}))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("width", "hidden"), [(0, 16), (16, 0)])
def test_biases_of_experts_without_a_width_have_their_gradients(gated, width, hidden):
    assert_follows_oracle(Shape(20, width, hidden, 2, 2), gated=gated)


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", [pytest.param("half", marks=pytest.mark.slow), "tf32", "ieee"])
def test_tiles_fit_together_along_rows_columns_and_terms(monkeypatch, kind, gated):
    monkeypatch.setattr(configs, "arithmetic", lambda dtype: kind)
    dtype = torch.float16 if kind == "half" else torch.float32
    shape = Shape(210, 80, 140, 3, 2) if kind == "half" else Shape(120, 40, 100, 3, 2)
    rows = shape.tokens * shape.k
    tile = configs.choose("project_in", torch.device("cpu"), dtype, rows, shape.experts, shape.width, shape.hidden)
    assert tile.block_m < rows / shape.experts and tile.block_n < shape.hidden and tile.block_k < shape.width
    assert_follows_oracle(shape, "dropless", dtype, gated=gated)


def test_wide_tiles_whose_epilogue_has_parts_follow_the_oracle():
    assert_follows_oracle(Shape(80, 64, 160, 2, 2), dtype=torch.float16, activation="silu")


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
    [(Shape(80, 64, 256, 2, 2), False, 4), (Shape(80, 64, 160, 2, 2), True, 6), (SHAPES["odd"], True, 0)],
    ids=["even", "uneven", "unaligned"],
)
def test_weights_read_by_descriptors_follow_the_oracle(by_descriptors, shape, gated, descriptors):
    assert_follows_oracle(shape, dtype=torch.float16, gated=gated)
    assert len(by_descriptors) == descriptors


def test_a_weight_on_an_odd_address_is_read_by_pointers(by_descriptors):
    _, x, gates, plan, experts = case(Shape(80, 64, 160, 2, 2), dtype=torch.float16)
    weight = experts.in_weight
    moved = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(weight.shape)
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    y, z = forward(x, gates, plan, experts)
    by_descriptors.clear()
    odd_y, odd_z = forward(x, gates, plan, experts._replace(in_weight=moved))
    assert torch.equal(odd_y, y) and torch.equal(odd_z, z) and len(by_descriptors) == 1


def test_the_halves_of_one_weight_are_read_where_they_are(by_descriptors):
    """With z recomputed, which reads them too."""
    dy, x, gates, plan, experts = case(Shape(40, 64, 96, 3, 2), dtype=torch.float16, gated=True, bias=False)
    gate_half, in_half = torch.cat((experts.gate_weight, experts.in_weight), dim=1).chunk(2, dim=1)
    with CopiesOf((3, 96, 64)) as copies:
        in_half.contiguous()
        y, z = forward(x, gates, plan, experts._replace(in_weight=in_half, gate_weight=gate_half), False)
        gradients = backward(dy, x, gates, plan, experts._replace(in_weight=in_half, gate_weight=gate_half), z)

    assert copies.seen == 1, "that of the test alone"
    wanted_y, wanted_z = forward(x, gates, plan, experts, True)
    assert torch.equal(y, wanted_y) and z.numel() == 0
    for name, gradient in backward(dy, x, gates, plan, experts, wanted_z).items():
        assert torch.equal(gradients[name], gradient), name


def test_a_recomputed_z_gives_bitwise_the_same_gradients():
    dy, x, gates, plan, experts = case(SHAPES["odd"], dtype=torch.float16, gated=True)
    y, z = forward(x, gates, plan, experts)
    inferred, nothing = forward(x, gates, plan, experts, keep_z=False)
    assert torch.equal(y, inferred) and nothing.numel() == 0
    kept, again = (backward(dy, x, gates, plan, experts, pre) for pre in (z, nothing))
    for name in GRADIENTS:
        assert torch.equal(kept[name], again[name]), name


def test_what_lies_in_empty_rows_and_in_tokens_without_a_row_has_no_effect(poisoned_memory):
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
    assert_follows_oracle(shape, routing, gated=gated, seed=seed)


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
