"""The layer under torch.func: functional gradients with its losses, per-sample gradients, nothing left behind."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from clipup import SparseMoE, aux_loss, moe_metrics

D = 12
OPTIONS = {
    "plain": {"balance_weight": 0.5, "z_weight": 0.25},
    "shared": {"balance_weight": 0.5, "shared_expert": True, "granularity": 2, "capacity_factor": 1.0},
    "norm": {"z_weight": 0.25, "norm": "layer", "gated": True, "selection_bias": "sign", "score_function": "sigmoid"},
}


def make_layer(**options):
    torch.manual_seed(0)
    return SparseMoE(D, 16, **{"num_experts": 4, **options})


def loss_of(layer):
    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum() + aux_loss(layer)

    return loss


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_functional_gradients_with_the_losses_are_those_of_backward(options):
    layer, x = make_layer(**options), torch.randn(9, D)
    parameters = dict(layer.named_parameters())
    torch.manual_seed(1)
    expected = torch.autograd.grad(loss_of(layer)(parameters, x), tuple(parameters.values()))
    torch.manual_seed(1)
    found = grad(loss_of(layer))(parameters, x)
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", ["plain", "shared"])
def test_gradients_by_sample_with_the_losses_are_those_of_the_samples(options):
    layer, batch = make_layer(**OPTIONS[options]), torch.randn(3, 9, D)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    torch.manual_seed(1)
    found = vmap(grad(loss_of(layer)), in_dims=(None, 0), randomness="different")(parameters, batch)
    torch.manual_seed(1)
    for index, x in enumerate(batch):
        for name, one in grad(loss_of(layer))(parameters, x).items():
            torch.testing.assert_close(found[name][index], one)


def test_forwards_inside_a_transform_leave_nothing_behind():
    layer, x = make_layer(**OPTIONS["plain"]), torch.randn(9, D)
    layer(x)
    metrics, loss = moe_metrics(layer)[""], aux_loss(layer)
    grad(lambda x: 0 * x.sum() + layer(x).detach().sum())(2 * x)  # no backward pass goes through this forward
    assert aux_loss(layer) == 0
    assert all(torch.equal(value, metrics[name]) for name, value in moe_metrics(layer)[""].items())
    layer(x)
    assert torch.equal(aux_loss(layer), loss)
