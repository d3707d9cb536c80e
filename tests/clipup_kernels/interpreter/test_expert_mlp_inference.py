"""Both products of inference in one launch, interpreted: the oracle's y in float64, and the function of two launches.

In float32 and float16: the interpreter's bfloat16 is wrong.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import ROUTINGS, Experts, Shape, assert_follows, double, make_experts, randn, route, seeded
from torch import Tensor

from clipup_kernels import ACTIVATIONS, reference
from clipup_kernels.triton import configs, expert_mlp
from clipup_kernels.triton.configs import Config
from clipup_kernels.triton.expert_mlp_inference import project_both
from clipup_kernels.triton.grouped_linear import project_rows

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

SHAPES = {
    "several tiles": Shape(96, 32, 64, 4, 2),
    "a width that does not fill its tile": Shape(37, 24, 80, 5, 3),
    "one row": Shape(1, 16, 32, 4, 1),
    "no rows": Shape(0, 16, 32, 4, 2),
    "one expert": Shape(70, 64, 96, 1, 1),
    "all experts": Shape(21, 16, 32, 4, 4),
    "experts without rows": Shape(3, 16, 32, 64, 2),
}


def tile_for(width: int) -> Config:
    """32 rows and 16 hidden units at a time."""
    return Config(32, 16, max(16, 1 << (width - 1).bit_length()), 4, 2)


def inputs(shape, routing="capacity", dtype=torch.float32, activation="gelu", bias=True, gated=False, seed=0):
    gates, plan = route(shape, routing, seed)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 10)
    return x, gates, plan, make_experts(shape, dtype, activation, bias, gated, seed + 20)


def rows_of(x, plan, experts: Experts, config: Config) -> Tensor:
    top_k, (*first, activation, gate_weight, gate_bias) = plan.row_of_choice.shape[1], experts
    return project_both(
        x, plan.offsets, plan.choice_of_row, top_k, *first, gate_weight, gate_bias, activation, config
    )  # fmt: skip


def rows_by_two_launches(x, plan, experts: Experts) -> Tensor:
    in_weight, in_bias, out_weight, out_bias, activation, gate_weight, gate_bias = experts
    _, a = expert_mlp.project_in(
        x, plan.offsets, plan.choice_of_row, plan.row_of_choice.shape[1], in_weight, in_bias, gate_weight, gate_bias,
        activation, keep_z=False, keep_a=True,
    )  # fmt: skip
    return project_rows(a, out_weight, out_bias, plan.offsets)


def forward(x, gates, plan, experts: Experts, keep_z=False):
    return expert_mlp.expert_mlp_forward(x, gates, *plan, *experts[:4], *experts[5:], experts.activation, keep_z)


def assert_rows_follow_oracle(shape, routing="capacity", dtype=torch.float32, **form):
    x, _, plan, experts = inputs(shape, routing, dtype, **form)
    rows, filled = rows_of(x, plan, experts, tile_for(shape.width)), int(plan.offsets[-1])
    assert rows.shape == (shape.tokens * shape.k, shape.width) and rows.dtype == dtype
    wide = double(experts)
    a = reference.permute(double(x), plan)
    z = reference.grouped_linear(a, wide.in_weight, wide.in_bias, plan.offsets)
    a = reference.activate(z, experts.activation)
    if experts.gate_weight is not None:
        gate_z = reference.grouped_linear(
            reference.permute(double(x), plan), wide.gate_weight, wide.gate_bias, plan.offsets
        )
        a = reference.activate(gate_z, experts.activation) * z
    want = reference.grouped_linear(a, wide.out_weight, wide.out_bias, plan.offsets)
    assert_follows(rows[:filled], want[:filled], dtype)
    assert rows[filled:].isnan().all()  # neither read nor written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_follows_the_oracle(shape, gated, dtype):
    assert_rows_follow_oracle(shape, "capacity" if shape.tokens > 1 else "dropless", dtype, gated=gated)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_follows_the_oracle_and_empty_rows_stay_untouched(routing):
    assert_rows_follow_oracle(SHAPES["several tiles"], routing, torch.float16)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form_of_expert_follows_the_oracle(activation, bias, gated):
    shape = SHAPES["a width that does not fill its tile"]
    assert_rows_follow_oracle(shape, activation=activation, bias=bias, gated=gated)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda t, d, h, e, k: Shape(t, d, 16 * h, e, min(k, e)),
        st.integers(0, 120), st.integers(1, 90), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4),
    ),
    routing=st.sampled_from(ROUTINGS), gated=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_routing_follows_the_oracle(shape, routing, gated, seed):
    assert_rows_follow_oracle(shape, routing, gated=gated, seed=seed)


def integers(like: Tensor | None, most: int, seed: int, unit: float = 1.0) -> Tensor | None:
    """float16 multiples of ``unit``, up to ``most`` of them, of some tensor's shape."""
    return None if like is None else (torch.randint(-most, most + 1, like.shape, generator=seeded(seed)) * unit).half()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_z_and_a_are_rounded_where_two_launches_round_them(gated):
    """z are sums of integers over 1024, and an output is one a: no order of sums matters, only the roundings do."""
    shape = Shape(60, 32, 64, 3, 2)
    x, _, plan, experts = inputs(shape, "dropless", gated=gated)
    unit_of_column = torch.rand(shape.experts, shape.hidden, generator=seeded(1)).argsort(1)[:, : shape.width]
    experts = experts._replace(
        in_weight=integers(experts.in_weight, 7, 2, 2**-10), in_bias=integers(experts.in_bias, 2001, 3, 2**-10),
        out_weight=torch.nn.functional.one_hot(unit_of_column, shape.hidden).half(), out_bias=None,
        gate_weight=integers(experts.gate_weight, 7, 4, 2**-10), gate_bias=integers(experts.gate_bias, 2001, 5, 2**-10),
    )  # fmt: skip
    x = integers(x, 9, 0)
    ours = rows_of(x, plan, experts, tile_for(shape.width))
    assert ours.isfinite().all() and torch.equal(ours, rows_by_two_launches(x, plan, experts))
    in_float32 = Experts(*(e.float() if isinstance(e, Tensor) else e for e in experts))
    assert not torch.equal(ours, rows_of(x.float(), plan, in_float32, tile_for(shape.width)).half())


def launches(monkeypatch) -> list[str]:
    """The names of the products that are launched from now on."""
    seen = []
    for name in ("project_in", "project_rows", "project_both"):
        launch = getattr(expert_mlp, name)
        monkeypatch.setattr(expert_mlp, name, lambda *a, _l=launch, _n=name, **k: seen.append(_n) or _l(*a, **k))
    return seen


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A function that adds the config of ``project_both`` for a shape to an empty table."""
    monkeypatch.setenv(configs.TABLE_PATH, str(tmp_path / "table.json"))
    configs.forget()

    def store(shape, config):
        configs.store({configs.entry_name(90, "project_both", "half", "many", shape.width, shape.hidden): config})

    yield store
    configs.forget()


def test_where_one_launch_was_measured_to_be_faster_inference_takes_it_and_training_does_not(monkeypatch, measured):
    shape = Shape(800, 48, 64, 2, 2)  # 800 rows an expert
    measured(shape, configs.both_tile(90, shape.width))
    x, gates, plan, experts = inputs(shape, "masked", torch.float16)
    seen = launches(monkeypatch)
    inferred, nothing = forward(x, gates, plan, experts)
    assert seen == ["project_both"] and nothing.numel() == 0
    trained, _ = forward(x, gates, plan, experts, keep_z=True)
    assert seen == ["project_both", "project_in", "project_rows"]
    want = reference.expert_mlp(*double((x, gates)), plan, *double(experts))
    assert_follows(inferred, want, torch.float16, "y")
    assert_follows(inferred, trained.double(), torch.float16, "y of inference")


def test_where_nothing_was_measured_inference_takes_two_launches(monkeypatch):
    shape = Shape(800, 32, 64, 1, 1)
    x, gates, plan, experts = inputs(shape, "dropless", torch.float16)
    seen = launches(monkeypatch)
    y, _ = forward(x, gates, plan, experts)
    assert seen == ["project_in", "project_rows"]
    assert_follows(y, reference.expert_mlp(*double((x, gates)), plan, *double(experts)), torch.float16)


def test_a_table_switches_it_on_and_off(monkeypatch, measured):
    wide, narrow = Shape(800, 256, 64, 1, 1), Shape(800, 32, 64, 1, 1)
    measured(wide, Config(64, 32, 256, 8, 2))
    measured(narrow, None)
    seen = launches(monkeypatch)
    for shape in (wide, narrow):
        x, gates, plan, experts = inputs(shape, "dropless", torch.float16)
        y, _ = forward(x, gates, plan, experts)
        assert_follows(y, reference.expert_mlp(*double((x, gates)), plan, *double(experts)), torch.float16)
    assert seen == ["project_both", "project_in", "project_rows"]


@pytest.mark.parametrize("config", [Config(32, 16, 16, 4, 2), Config(32, 128, 32, 4, 2)])
def test_a_config_that_is_not_for_these_weights_is_refused(config):
    x, _, plan, experts = inputs(SHAPES["several tiles"])
    with pytest.raises(ValueError, match=r"project_both.*\[4, 64, 32\].*delete"):
        rows_of(x, plan, experts, config)


def test_what_lies_in_tokens_without_a_row_is_never_read():
    x, gates, plan, experts = inputs(SHAPES["several tiles"], "masked")
    filled, nowhere = int(plan.offsets[-1]), (plan.row_of_choice < 0).all(1)
    clean = rows_of(x, plan, experts, tile_for(32))[:filled]
    assert 0 < nowhere.sum() < len(nowhere)
    x[nowhere] = torch.nan
    assert torch.equal(rows_of(x, plan, experts, tile_for(32))[:filled], clean)


def test_strided_arguments_are_read_as_they_are_indexed():
    x, _, plan, experts = inputs(SHAPES["several tiles"], "dropless")
    strided = experts._replace(
        in_weight=experts.in_weight.mT.contiguous().mT, out_weight=experts.out_weight.mT.contiguous().mT
    )
    spread = torch.stack([x, x], -1)[..., 0]
    assert not spread.is_contiguous() and not strided.in_weight.is_contiguous()
    assert torch.equal(rows_of(spread, plan, strided, tile_for(32)), rows_of(x, plan, experts, tile_for(32)))
