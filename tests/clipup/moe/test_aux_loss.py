"""How auxiliary losses are collected: each forward is counted once, whatever runs around it, and nothing leaks."""

import pytest
import torch
from tiny_clip import contrastive_loss, tiny_clip
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipup import MoEConfig, SparseMoE, aux_loss, collect_aux_losses, moe_metrics, upcycle
from clipup.clip.inputs import random_inputs

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


def test_the_loss_of_the_only_forward_whose_output_is_used_is_counted_once(x):
    layer = make_layer()
    layer(3 * x)
    y = layer(x)
    torch.testing.assert_close(aux_loss(layer).detach(), metrics_loss(layer))
    assert y.requires_grad and aux_loss(layer) == aux_loss(nn.Linear(2, 2)) == 0


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


def test_backward_without_the_losses_warns_that_they_are_lost(x, recwarn):
    layer = make_layer()
    loss = layer(x).sum()
    (loss + aux_loss(layer)).backward()
    assert not recwarn.list
    loss = layer(x).sum()
    with pytest.warns(UserWarning, match="add clipup.aux_loss"):
        loss.backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_aux_loss_warns_once_of_a_forward_in_evaluation_mode(x, compiled, recwarn):
    layer = make_layer().eval()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.no_grad():
        run(x)
    assert aux_loss(layer) == 0
    run(x).sum().backward()
    layer.train()(x)  # the pass before was not trained on
    assert aux_loss(layer) > 0 and not recwarn.list
    layer.eval()
    run(x).sum().backward()  # nobody takes losses
    assert not recwarn.list
    with pytest.warns(UserWarning, match="in evaluation mode.*model.train()"):
        assert aux_loss(layer) == 0
    run(x)
    assert aux_loss(layer) == 0 and not recwarn.list


def test_collect_aux_losses_warns_of_evaluation_mode_inside_its_block_alone(x, recwarn):
    model = model_of().eval()
    model(x)
    with collect_aux_losses(model):
        pass
    assert not recwarn.list
    with pytest.warns(UserWarning, match="2 of 2 sparse layers recorded"):
        with collect_aux_losses(model):
            model(x)


def test_backward_of_an_earlier_forward_keeps_the_loss_of_the_last_one(x):
    layer = make_layer()
    first, second = layer(x), layer(2 * x)
    expected = metrics_loss(layer)
    first.sum().backward()
    torch.testing.assert_close(aux_loss(layer).detach(), expected)
    del second


def gradients(model, run):
    model.zero_grad()
    loss = run()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [{"z_weight": 0.1}, {"selection_bias": "sign"}], ids=["losses", "selection bias"])
def test_reentrant_checkpointing_warns_and_leaves_no_losses(x, config):
    layer = SparseMoE(D, 16, MoEConfig(num_experts=4, **config))
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        y = checkpoint(layer, x, use_reentrant=True)
    y.sum().backward()
    assert aux_loss(layer) == 0
    assert layer.state.take_load() is None


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_model_trains_as_the_eager_one(checkpointing):
    model = upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=4, blocks=(1,)), inplace=True)
    model.set_grad_checkpointing(checkpointing)
    images, texts = random_inputs(model, 3)
    compiled = torch.compile(model, backend="aot_eager")

    def step(run):
        torch.manual_seed(3)
        return gradients(model, lambda: contrastive_loss(run, images, texts) + aux_loss(model))

    torch.testing.assert_close(step(model), step(compiled))
    torch.testing.assert_close(step(model), step(compiled))
    assert aux_loss(model) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_layers_are_counted_once_and_compile_to_one_graph(x, compiled):
    options = {"selection_bias": "sign", "capacity_factor": 1.0, "shared_expert": True}
    options |= {} if compiled else {"selection_bias": "none", "router_noise": 1.0, "load_weight": 0.1}
    layers = nn.ModuleList([make_layer(**options), make_layer(**options)])

    def run(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def step(run):
        torch.manual_seed(3)
        found = gradients(layers, lambda: run(x).square().sum() + aux_loss(layers))
        return *found, [layer.state.take_load() for layer in layers]

    plain = step(lambda x: layers[1](layers[0](x)))
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    for _ in range(2):
        torch.testing.assert_close(step(run), plain)
        assert aux_loss(layers) == 0


def model_of():
    return nn.Sequential(make_layer(), nn.Linear(D, D), make_layer())


def test_collect_aux_losses_gives_the_losses_of_its_block_by_layer(x):
    model = model_of()
    model(x)
    expected = aux_loss(model)
    earlier = model(x)

    with collect_aux_losses(model) as losses:
        model(x)
        with pytest.raises(RuntimeError, match="after it"):  # not 0, with which a step would train nothing of them
            _ = losses.total
    with collect_aux_losses(model) as twice:
        outputs = model(x), model(x), earlier  # the loss of an output that is gone is none

    assert list(losses.by_layer) == ["0", "2"] and torch.equal(losses.total, expected)
    torch.testing.assert_close(twice.total, 2 * expected)
    assert len(outputs) == 3 and aux_loss(model) == 0
    losses.total.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in (model[0], model[2]))
    with pytest.raises(ZeroDivisionError), collect_aux_losses(model) as losses:
        model(x)
        raise ZeroDivisionError
    assert losses.by_layer == {} and aux_loss(model) == 0
