"""How auxiliary losses are collected: each forward is counted once, whatever runs around it, and nothing leaks."""

import functools
import gc
import warnings

import pytest
import torch
from tiny_clip import contrastive_loss, tiny_clip
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipup import MoEConfig, SparseMoE, aux_loss, moe_metrics, upcycle
from clipup.clip.inputs import random_inputs
from clipup.moe import layer_state
from clipup.moe.layer_state import LossRecord

D = 12


def make_layer(**options):
    torch.manual_seed(0)
    return SparseMoE(D, 16, **{"num_experts": 4, "balance_weight": 0.5, "z_weight": 0.25, **options})


@pytest.fixture
def x():
    return torch.randn(10, D, requires_grad=True)


def metrics_loss(layer):
    metrics = moe_metrics(layer)[""]
    return 0.5 * metrics["balance"] + 0.25 * metrics["z"]


def test_loss_of_a_forward_is_counted_once(x):
    layer = make_layer()
    layer(x)
    torch.testing.assert_close(aux_loss(layer).detach(), metrics_loss(layer))
    assert aux_loss(layer) == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forwards_that_cannot_be_trained_on_leave_no_loss(x, context):
    layer = make_layer()
    with context():
        layer(x)
    layer.eval()(x)
    layer.train().requires_grad_(False)(x.detach())
    assert aux_loss(layer) == 0
    plain = make_layer(balance_weight=0, z_weight=0)
    plain(x)
    assert aux_loss(plain) == 0


def test_nothing_to_take_is_a_zero_that_can_be_added():
    for model in (nn.Linear(2, 2), nn.Identity(), make_layer()):
        loss = aux_loss(model)
        assert loss == 0 and loss.shape == () and loss.dtype == torch.float32


def test_loss_that_nobody_took_goes_with_the_backward_pass(x):
    layer = make_layer()
    layer(x).sum().backward()
    assert aux_loss(layer) == 0


def test_loss_goes_when_only_the_forward_of_an_earlier_step_was_trained_on(x):
    layer = make_layer()
    first, second = layer(x), layer(2 * x)
    expected = metrics_loss(layer)
    first.sum().backward()
    torch.testing.assert_close(aux_loss(layer).detach(), expected)
    del second


def live_records():
    gc.collect()
    return sum(type(thing) is LossRecord for thing in gc.get_objects())


def test_forwards_that_nobody_uses_do_not_pile_up(x):
    layer = make_layer()
    before = live_records()
    for _ in range(4):
        layer(x)
    assert live_records() == before + 1
    torch.testing.assert_close(aux_loss(layer).detach(), metrics_loss(layer))


def gradients(model, run):
    model.zero_grad()
    loss = run()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(one, other):
    torch.testing.assert_close(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], msg=name)


def test_checkpointed_forward_is_counted_once_with_the_same_gradients(x):
    layer = make_layer(capacity_factor=1.0, router_noise=1.0, load_weight=0.1)

    def step(run):
        torch.manual_seed(3)
        return gradients(layer, lambda: run(x).square().sum() + aux_loss(layer))

    assert_equal_steps(step(layer), step(lambda x: checkpoint(layer, x, use_reentrant=False)))
    assert aux_loss(layer) == 0


class Rerun(torch.autograd.Function):
    """Checkpointing of one's own."""

    @staticmethod
    def forward(ctx, layer, x):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(gradient)
        return None, x.grad


@pytest.mark.parametrize("config", [{"z_weight": 0.1}, {"selection_bias": "sign"}], ids=["losses", "selection bias"])
@pytest.mark.parametrize(
    ("run", "cause"),
    [(functools.partial(checkpoint, use_reentrant=True), "use_reentrant=False"), (Rerun.apply, "Rerun")],
    ids=["reentrant checkpointing", "own function"],
)
def test_a_training_forward_that_can_store_nothing_warns_once_and_leaves_nothing(x, run, cause, config):
    layer = SparseMoE(D, 16, MoEConfig(num_experts=4, **config))
    layer_state.warn_of.cache_clear()
    with pytest.warns(UserWarning, match=cause):
        y = run(layer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(layer, x)  # it has been said
        y.sum().backward()
    assert aux_loss(layer) == 0
    assert layer.state.take_load() is None


@pytest.mark.filterwarnings("error")
def test_a_training_forward_that_stores_or_has_nothing_to_store_does_not_warn(x):
    layer, unweighted = make_layer(), SparseMoE(D, 16, MoEConfig(num_experts=4))
    layer_state.warn_of.cache_clear()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    with torch.no_grad():
        layer(x)
    Rerun.apply(unweighted, x).sum().backward()
    Rerun.apply(layer.eval(), x).sum().backward()


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_model_trains_as_the_eager_one(checkpointing):
    model = upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=4, blocks=(1,)), inplace=True)
    model.set_grad_checkpointing(checkpointing)
    images, texts = random_inputs(model, 3)
    compiled = torch.compile(model, backend="aot_eager")

    def step(run):
        return gradients(model, lambda: contrastive_loss(run, images, texts) + aux_loss(model))

    assert_equal_steps(step(model), step(compiled))
    assert_equal_steps(step(model), step(compiled))
    assert aux_loss(model) == 0


def test_compiled_layer_holds_the_losses_of_its_last_forward(x):
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(2 * x)
    torch.testing.assert_close(aux_loss(layer).detach(), metrics_loss(layer))
    assert aux_loss(layer) == 0
    del first, second


@pytest.mark.parametrize("options", [{"selection_bias": "sign", "capacity_factor": 1.0, "shared_expert": True}])
def test_checkpointed_layer_compiles_to_one_graph_and_is_counted_once(x, options):
    layers = nn.ModuleList([make_layer(**options), make_layer(**options)])

    def run(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def step(run):
        return gradients(layers, lambda: run(x).square().sum() + aux_loss(layers))

    plain = step(lambda x: layers[1](layers[0](x)))
    loads = [layer.state.take_load() for layer in layers]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_equal_steps(step(compiled), plain)
        assert aux_loss(layers) == 0
        for layer, load in zip(layers, loads, strict=True):
            torch.testing.assert_close(layer.state.take_load(), load)
