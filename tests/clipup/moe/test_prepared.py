"""Prepared layers: one packed copy of their weights, nothing stale, nothing trained or lost by accident."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from tiny_families import TIMM, timm_model
from torch import nn

import clipup
from clipup.dense.prepared import PreparedMLP
from clipup.moe import prepared as prepared_module
from clipup.moe.prepared import PreparedMoE
from clipup.moe.router import Router
from clipup_kernels import packed_layout
from clipup_kernels.backends import registry

LAYERS = {
    "plain": {},
    "gated, no bias": {"gated": True, "bias": False, "activation": "silu"},
    "norm": {"norm": "layer"},
    "fine-grained": {"granularity": 2, "num_experts": 8},
    "shared expert": {"shared_expert": True},
    "shared expert, fine-grained": {"shared_expert": True, "granularity": 2, "num_experts": 8},
    "selection bias": {"selection_bias": "sign"},
    "dropout": {"dropout": 0.1},
}


def layer(name="plain", dtype=torch.float32, **others):
    torch.manual_seed(0)
    made = clipup.SparseMoE(24, 48, **{"num_experts": 4, "top_k": 2, "dtype": dtype} | LAYERS[name] | others)
    return made.eval()


def tokens(count=50, dtype=torch.float32):
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(c_fc=nn.Linear(24, 48), gelu=nn.GELU(), c_proj=nn.Linear(48, 24))).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_prepared_layer_gives_the_plain_layers_bits(name, dtype):
    plain, x = layer(name, dtype), tokens(dtype=dtype)
    mask = torch.arange(50) % 3 > 0
    prepared = clipup.accelerate(plain)
    assert type(prepared) is PreparedMoE and isinstance(prepared, clipup.SparseMoE)
    with torch.no_grad():
        assert torch.equal(prepared(x), plain(x))
        assert torch.equal(prepared(x, mask), plain(x, mask))


def count_calls_of_the_one_op(monkeypatch):
    calls, op = [], prepared_module.packed_sparse_mlp
    monkeypatch.setattr(prepared_module, "packed_sparse_mlp", lambda *a, **k: calls.append(1) or op(*a, **k))
    return calls


needs_packing = pytest.mark.skipif(packed_layout(torch.float32) == "plain", reason="nothing is packed here")


@needs_packing
def test_a_forward_pass_is_one_op_whose_routing_can_be_looked_at(monkeypatch):
    calls = count_calls_of_the_one_op(monkeypatch)
    plain, x, mask = layer("shared expert, fine-grained"), tokens(), torch.arange(50) % 3 > 0
    prepared = clipup.accelerate(plain)
    with torch.no_grad():
        for one in (plain, prepared):
            one(x.view(5, 10, 24), mask.view(5, 10))
    assert calls == [1]
    wanted, found = plain.state.last_routing, prepared.state.last_routing
    for name, value in wanted._asdict().items():
        assert torch.equal(getattr(found, name), value), name


class Steep(Router):
    def logits(self, x, mask=None):
        return 10 * super().logits(x, mask)


def hooked(made):
    made.router.register_forward_hook(lambda router, inputs, routing: routing._replace(gates=2 * routing.gates))


def steep(made):
    made.router.__class__ = Steep


def patched(made):
    made.router.logits = lambda x, mask=None: -Router.logits(made.router, x, mask)


def replaced(made):
    made.router.forward = lambda x, mask=None: Router.forward(made.router, -x, mask)


def experts_replaced(made):
    made.run_experts = lambda *args: 2 * type(made).run_experts(made, *args)


def scaled(made):
    made.gate_scale = lambda: 3.0


def without_biases(made):
    plain = type(made).operands
    made.operands = lambda dtype: plain(made, dtype) | {"in_bias": None, "out_bias": None}


@needs_packing
def test_hooks_of_all_modules_see_the_router():
    prepared, seen = clipup.accelerate(layer()), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with torch.no_grad():
            prepared(tokens())
    finally:
        handle.remove()
    assert seen == [Router, PreparedMoE]


@needs_packing
@pytest.mark.parametrize(
    "change",
    [hooked, steep, patched, replaced, experts_replaced, scaled, without_biases],
    ids=lambda change: change.__name__,
)
def test_a_changed_router_is_called(change, monkeypatch):
    calls = count_calls_of_the_one_op(monkeypatch)
    plain, x = layer(), tokens()
    prepared = clipup.accelerate(plain)
    with torch.no_grad():
        before = prepared(x)
        for one in (plain, prepared):
            change(one)
        assert torch.equal(prepared(x), plain(x)) and not torch.equal(prepared(x), before)
    assert calls == [1]


@needs_packing
@pytest.mark.parametrize("option", [{"score_function": "sigmoid"}, {"normalize_gates": "after_drop"}], ids=str)
def test_options_that_the_one_op_lacks_mean_the_same(option, monkeypatch):
    calls = count_calls_of_the_one_op(monkeypatch)
    plain, x = layer(eval_capacity_factor=0.5, **option), tokens()
    with torch.no_grad():
        assert torch.equal(clipup.accelerate(plain)(x), plain(x))
    assert not calls


@needs_packing
def test_routing_that_failed_its_self_check_is_not_in_the_one_op(monkeypatch):
    calls = count_calls_of_the_one_op(monkeypatch)
    prepared, x = clipup.accelerate(layer()), tokens()
    registry.distrust("cpp", "topk_gating", torch.float32, "it is broken")
    try:
        with torch.no_grad():
            prepared(x)
        assert not calls
    finally:
        registry.distrust("cpp", "topk_gating", torch.float32, None)
    with torch.no_grad():
        prepared(x)
    assert calls


def test_a_prepared_mlp_gives_the_mlps_output_to_rounding():
    plain = mlp()
    prepared = clipup.accelerate(plain)
    assert type(prepared) is PreparedMLP
    assert (prepared(tokens()) - plain(tokens())).abs().max() < 1e-5
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in prepared.state_dict().items())


@pytest.mark.parametrize("name", [name for name in TIMM if not name.endswith("normed")])
def test_state_dicts_of_every_family_go_both_ways(name):
    model = timm_model(name).eval()
    prepared = clipup.accelerate(model)
    assert prepared.state_dict().keys() == model.state_dict().keys()
    other = copy.deepcopy(model)
    with torch.no_grad():
        [parameter.mul_(1.5) for parameter in other.parameters()]
    prepared.load_state_dict(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in prepared.state_dict().items())
    model.load_state_dict(prepared.state_dict())


WRITES = {
    "a row through .data": lambda made: made.in_weight.data[2, 5].mul_(3),
    "one element through numpy": lambda made: made.out_weight.detach().numpy()[0, 1].__setitem__(2, 7.0),
    "an expert re-initialized": lambda made: made.in_weight.data[1].normal_(),
    "load_state_dict, assigned": lambda made: made.load_state_dict(
        {name: value + 1 for name, value in made.state_dict().items()}, assign=True
    ),
    "an average of weights": lambda made: [p.data.lerp_(torch.ones_like(p), 0.5) for p in made.parameters()],
    "swapped": lambda made: torch.utils.swap_tensors(made.in_weight, nn.Parameter(made.in_weight * 2)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_plain_layer_computes_with_the_weights_that_it_has_now(write):
    plain, x = layer(), tokens()
    with torch.no_grad():
        before = [plain(x) for _ in range(4)][-1]
        WRITES[write](plain)
        fresh = layer()
        fresh.load_state_dict(plain.state_dict())
        after = plain(x)
        assert torch.equal(after, fresh(x))
        assert not torch.equal(after, before)


def test_a_prepared_layer_does_not_follow_the_layer_that_it_was_made_of():
    plain, x = layer(), tokens()
    prepared = clipup.accelerate(plain)
    before = prepared(x)
    with torch.no_grad():
        [parameter.zero_() for parameter in plain.parameters()]
    assert torch.equal(prepared(x), before)


@pytest.mark.parametrize("form", ["plain", "prepared", "prepared MLP"])
def test_threads_share_a_layer(form):
    """First calls at once, of several sizes: nothing is half made when another thread reads it."""
    wrong = []
    for _ in range(10):
        made = mlp() if form == "prepared MLP" else layer("plain", num_experts=8)
        made = made if form == "plain" else clipup.accelerate(made)
        inputs = [tokens(count) for count in (50, 7, 200, 33)]
        barrier, results = threading.Barrier(4), {}

        def run(index, made=made, inputs=inputs, barrier=barrier, results=results):
            barrier.wait()
            with torch.no_grad():
                results[index] = [made(inputs[index]) for _ in range(5)]

        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        with torch.no_grad():
            wrong += [i for i, found in results.items() for y in found if not torch.equal(y, made(inputs[i]))]
    assert not wrong


def _through_pickle(made):
    return pickle.loads(pickle.dumps(made))


def _through_torch_save(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_torch_save])
@pytest.mark.parametrize("make", [lambda: layer("shared expert, fine-grained"), lambda: layer("norm"), mlp])
def test_copies_compute_the_same(make, copied):
    prepared, x = clipup.accelerate(make()), tokens()
    other = copied(prepared)
    assert torch.equal(other(x), prepared(x))
    assert list(other.state_dict()) == list(prepared.state_dict())
    with pytest.raises(RuntimeError, match="no training mode"):
        other.train()


def test_what_is_pickled_fits_every_cpu(tmp_path):
    """Packed weights belong to one CPU's instructions; what pickle stores is read by any."""
    prepared = clipup.accelerate(layer())
    torch.save((prepared, tokens(), prepared(tokens())), tmp_path / "layer.pt")
    code = (
        "import sys, torch, clipup; layer, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "print((layer(x) - y).abs().max().item() < 1e-5, layer.in_weight.layout)"
    )
    env = os.environ | {"CLIPUP_CPU_ISA": "portable"}
    command = [sys.executable, "-c", code, str(tmp_path / "layer.pt")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    close, layout = run.stdout.split()
    assert close == "True" and (layout == "plain" or layout != prepared.in_weight.layout)


def test_another_process_takes_a_prepared_layer():
    prepared, x = clipup.accelerate(layer()), tokens(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(nn.Module.__call__, (prepared, x)), prepared(x))


def test_one_copy_of_the_weights_is_held():
    made = layer(num_experts=8)
    gone = [weakref.ref(made.in_weight), weakref.ref(made.out_weight)]
    prepared = clipup.accelerate(made, inplace=True)
    gc.collect()
    assert prepared is made
    assert [reference() for reference in gone] == [None, None]
    held = sum(t.nbytes for t in (*prepared.parameters(), *prepared.buffers()))
    rows, columns = 8 * 48 * 24, 8 * 48 * 32  # D is filled up to whole panels
    assert held <= 4 * (rows + columns * 2 + 8 * (48 + 24) + 4 * 24 * 2)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda made: made.train(), RuntimeError, "no training mode"),
        (lambda made: made.requires_grad_(), RuntimeError, "cannot require gradients"),
        (lambda made: made.half(), RuntimeError, "of type torch.float32, and cannot become torch.float16"),
        (lambda made: made.to("meta"), RuntimeError, "stays on the CPU.*meta"),
        (lambda made: setattr(made, "in_weight", nn.Parameter(torch.ones(1))), AttributeError, "cannot be set"),
        (lambda made: made.in_weight.data.mul_(2), AttributeError, "cannot be trained or written to"),
        (lambda made: made.out_weight.mul_(2), AttributeError, "cannot be trained or written to"),
        (lambda made: made(tokens().requires_grad_()), NotImplementedError, "packed weights have no derivative"),
        (lambda made: made(tokens().half()), TypeError, "prepared in torch.float32; cast the plain model"),
        (lambda made: made.reset_parameters(), RuntimeError, "cannot be re-initialized"),
        (lambda made: made(None), TypeError, "x must be a tensor, got NoneType"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("in_weight"), "Missing key.*in_weight"),
        (lambda state: state.update(extra=torch.ones(1)), "Unexpected key.*extra"),
        (lambda state: state.update(in_weight=torch.ones(2, 3)), "size mismatch for in_weight"),
        (
            lambda state: state.update(in_weight="no"),
            "in_weight is str, expected a tensor of the prepared layer's type",
        ),
        (lambda state: state.update(in_bias=state["in_bias"].double()), "in_bias is torch.float64 on cpu, expected"),
        (lambda state: state.update(in_weight=state["in_weight"].to("meta")), "in_weight is torch.float32 on meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    prepared = clipup.accelerate(layer())
    state = prepared.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        prepared.load_state_dict(state)


@pytest.mark.parametrize("make", [layer, lambda: layer("shared expert"), mlp])
def test_prepared_layers_are_compiled_and_exported(make):
    prepared, x = clipup.accelerate(make()), tokens()
    with torch.no_grad():
        assert torch.equal(torch.compile(prepared, fullgraph=True)(x), prepared(x))
        shapes = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
        exported = torch.export.export(prepared, (x,), dynamic_shapes=shapes).module()
        assert torch.equal(exported(tokens(7)), prepared(tokens(7)))


def test_a_prepared_models_parameters_can_be_saved_and_loaded_as_a_plain_ones(tmp_path):
    plain = layer()
    torch.save(clipup.accelerate(plain).state_dict(), tmp_path / "weights.pt")
    other = layer()
    other.reset_parameters()
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        assert torch.equal(other(tokens()), plain(tokens()))


def test_writes_to_a_state_dict_reach_no_prepared_layer():
    for make in (layer, mlp):
        prepared, x = clipup.accelerate(make()), tokens()
        before = prepared(x)
        for name, value in prepared.state_dict().items():
            if not name.startswith("router"):
                value.zero_()
        assert torch.equal(prepared(x), before)


@pytest.mark.parametrize("x", [None, torch.tensor(1.0), torch.ones(3, 23)], ids=["None", "no dimension", "width"])
def test_a_prepared_mlp_names_a_wrong_x(x):
    with pytest.raises((TypeError, ValueError), match="^x must be"):
        clipup.accelerate(mlp())(x)
