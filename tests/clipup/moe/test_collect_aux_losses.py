"""``with collect_aux_losses(model)``: the losses of the forward passes inside, by layer."""

import pytest
import torch
from torch import nn

from clipup import MoEConfig, SparseMoE, aux_loss, collect_aux_losses

D = 16
WEIGHTED = MoEConfig(num_experts=4, balance_weight=0.1, z_weight=0.01)


def model_of(config=WEIGHTED):
    torch.manual_seed(0)
    return nn.Sequential(SparseMoE(D, 24, config), nn.Linear(D, D), SparseMoE(D, 24, config))


def test_losses_by_layer_and_their_sum_are_those_of_aux_loss():
    model, x = model_of(), torch.randn(9, D)
    model(x)
    expected = aux_loss(model)

    with collect_aux_losses(model) as losses:
        model(x)

    assert list(losses.by_layer) == ["0", "2"] and torch.equal(losses.total, expected)
    assert aux_loss(model) == 0
    losses.total.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in (model[0], model[2]))


def test_two_forward_passes_count_twice_and_earlier_ones_do_not():
    model, x = model_of(), torch.randn(9, D)
    model(x)
    with collect_aux_losses(model) as losses:
        outputs = model(x), model(x)
    assert len(outputs) == 2  # the loss of an output that is gone is none
    with collect_aux_losses(model) as once:
        model(x)
    torch.testing.assert_close(losses.total, 2 * once.total)


def test_after_an_error_nothing_is_left():
    model = model_of()
    with pytest.raises(ZeroDivisionError), collect_aux_losses(model) as losses:
        model(torch.randn(9, D))
        raise ZeroDivisionError
    assert losses.by_layer == {} and aux_loss(model) == 0
