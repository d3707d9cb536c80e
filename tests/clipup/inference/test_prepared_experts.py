"""Prepared layers: one packed copy of their weights, nothing stale, nothing trained or lost by accident."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import clipup
from clipup.inference import prepared_experts
from clipup.inference.prepared import PreparedMLP
from clipup.inference.prepared_experts import PreparedMoE
from clipup.moe.router import Router
from clipup_kernels import packed_layout

LAYERS = {
    "plain": {},
    "gated, no bias": {"gated": True, "bias": False, "activation": "silu"},
    "norm": {"norm": "layer", "dropout": 0.1},
    "shared expert, fine-grained": {"shared_expert": True, "granularity": 2, "num_experts": 8},
    "selection bias": {"selection_bias": "sign"},
}
needs_packing = pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")


def layer(name="plain", dtype=torch.float32, **others):
    torch.manual_seed(0)
    return clipup.SparseMoE(24, 48, **{"num_experts": 4, "dtype": dtype} | LAYERS[name] | others).eval()


def tokens(count=50, dtype=torch.float32):
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_prepared_layer_gives_the_plain_layers_bits(name, dtype):
    plain, x, mask = layer(name, dtype), tokens(dtype=dtype), torch.arange(50) % 3 > 0
    prepared = clipup.accelerate(plain)
    assert type(prepared) is PreparedMoE and isinstance(prepared, clipup.SparseMoE)
    with torch.no_grad():
        assert torch.equal(prepared(x), plain(x)) and torch.equal(prepared(x, mask), plain(x, mask))
    assert list(prepared.state_dict()) == list(plain.state_dict())


def test_a_prepared_mlp_gives_the_mlps_output_to_rounding():
    plain = nn.Sequential(OrderedDict(c_fc=nn.Linear(24, 48), gelu=nn.GELU(), c_proj=nn.Linear(48, 24))).eval()
    prepared = clipup.accelerate(plain)
    assert type(prepared) is PreparedMLP and (prepared(tokens()) - plain(tokens())).abs().max() < 1e-5
    with pytest.raises(TypeError, match="prepared in torch.float32"):
        prepared(tokens().half())
    with pytest.raises(ValueError, match="23"):
        prepared(torch.ones(3, 23))


@pytest.fixture
def calls(monkeypatch):
    """Grows with every call of the one op."""
    calls, op = [], prepared_experts.packed_sparse_mlp
    monkeypatch.setattr(prepared_experts, "packed_sparse_mlp", lambda *a, **k: calls.append(1) or op(*a, **k))
    return calls


@needs_packing
def test_a_prepared_layer_runs_one_op_and_keeps_its_routing(calls):
    plain, x, mask = layer("shared expert, fine-grained"), tokens(), torch.arange(50) % 3 > 0
    prepared = clipup.accelerate(plain)
    with torch.no_grad():
        for form in (plain, prepared):
            form(x.view(5, 10, 24), mask.view(5, 10))
    assert calls == [1]
    for name, value in plain.state.last_routing._asdict().items():
        assert torch.equal(getattr(prepared.state.last_routing, name), value), name


class Steep(Router):
    def logits(self, x, mask=None):
        return 10 * super().logits(x, mask)


CHANGES = {
    "hooked": ({}, lambda made: made.router.register_forward_hook(lambda *of: of[2]._replace(gates=2 * of[2].gates))),
    "another router": ({}, lambda made: setattr(made.router, "__class__", Steep)),
    "sigmoid": ({"score_function": "sigmoid"}, lambda made: None),
    "after_drop": ({"normalize_gates": "after_drop"}, lambda made: None),
    "expert_choice": ({"routing": "expert_choice"}, lambda made: None),
}


@needs_packing
@pytest.mark.parametrize(("options", "change"), CHANGES.values(), ids=CHANGES)
def test_layers_that_the_fused_op_does_not_cover_run_the_single_ops(options, change, calls):
    plain, x = layer(eval_capacity_factor=0.5, **options), tokens()
    prepared = clipup.accelerate(plain)
    change(plain), change(prepared)
    with torch.no_grad():
        assert torch.equal(prepared(x), plain(x))
    assert not calls


WRITES = {
    "one element through numpy": lambda made: made.out_weight.detach().numpy()[0, 1].__setitem__(2, 7.0),
    "an expert re-initialized": lambda made: made.in_weight.data[1].normal_(),
    "load_state_dict, assigned": lambda made: made.load_state_dict(
        {name: value + 1 for name, value in made.state_dict().items()}, assign=True
    ),
    "swapped": lambda made: torch.utils.swap_tensors(made.in_weight, nn.Parameter(made.in_weight * 2)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_layer_follows_writes_to_its_weights_and_its_prepared_copy_does_not(write):
    plain, x = layer(), tokens()
    prepared = clipup.accelerate(plain)
    with torch.no_grad():
        before = [plain(x) for _ in range(4)][-1]
        WRITES[write](plain)
        fresh = layer()
        fresh.load_state_dict(plain.state_dict())
        assert torch.equal(plain(x), fresh(x)) and not torch.equal(plain(x), before)
        assert torch.equal(prepared(x), before)  # which does not follow the layer that it was made of


def test_one_copy_of_the_weights_is_held():
    made = layer(num_experts=8)
    gone = [weakref.ref(made.in_weight), weakref.ref(made.out_weight)]
    prepared = clipup.accelerate(made, inplace=True)
    del made
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    held = sum(tensor.nbytes for tensor in (*prepared.parameters(), *prepared.buffers()))
    rows, columns = 8 * 48 * 24, 8 * 48 * 32  # D is filled up to whole panels
    assert held <= 4 * (rows + columns * 2 + 8 * (48 + 24) + 4 * 24 * 2)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda made: made.train(), RuntimeError, "no training mode"),
        (lambda made: made.half(), RuntimeError, "cannot become torch.float16"),
        (lambda made: made.to("meta"), RuntimeError, "stays on the CPU.*meta"),
        (lambda made: setattr(made, "in_weight", torch.ones(1)), AttributeError, "in_weight"),
        (lambda made: made.in_weight.data.mul_(2), AttributeError, "cannot be trained or written to"),
        (lambda made: made(tokens().requires_grad_()), NotImplementedError, "packed weights have no derivative"),
        (lambda made: made(tokens().half()), TypeError, "prepared in torch.float32"),
        (lambda made: made(tokens()[:, 1:]), ValueError, "x must be"),
    ],
)
def test_what_a_prepared_layer_cannot_do_is_refused_and_changes_nothing(act, error, message):
    prepared, x = clipup.accelerate(layer()), tokens()
    before = prepared(x)
    with pytest.raises(error, match=message):
        act(prepared)
    assert torch.equal(prepared(x), before)
    assert prepared.eval() is prepared and prepared.float() is prepared and prepared.cpu() is prepared
