"""What a capacity drops in training: an order drawn in every layer and forward pass, which says nothing about rows."""

import pytest
import torch

from clipup import SparseMoE

D, ROWS, PASSES = 8, 64, 300
ROUTINGS = [{}, {"priority": True}, {"routing": "expert_choice"}]


def make_layer(**options):
    """Each expert has room for half of identical tokens."""
    return SparseMoE(D, 8, **{"num_experts": 4, "top_k": 2, "capacity_factor": 1.0, **options})


def dropped(layers):
    """[PASSES, layers, ROWS]: 1 where the first expert of identical tokens had no slot for the row, else 0."""
    torch.manual_seed(0)
    token = torch.randn(D).expand(ROWS, D)
    passes = [[layer(token, return_routing=True)[1].kept[:, 0] for layer in layers] for _ in range(PASSES)]
    return torch.stack([torch.stack(rows) for rows in passes]).logical_not().double()


@pytest.mark.parametrize("options", ROUTINGS, ids=str)
def test_how_often_an_identical_token_is_dropped_does_not_depend_on_its_row(options):
    drops = dropped([make_layer(**options)])[:, 0]
    assert (drops.sum(1) == ROWS / 2).all()
    # a binomial distribution over the passes, and neighbours that are dropped together no more often than others
    assert (drops.mean(0) - 0.5).abs().max() < 4.5 * 0.5 / PASSES**0.5
    assert (2 * drops.roll(1, 1) - 1).mul(2 * drops - 1).mean().abs() < 0.05


@pytest.mark.parametrize("options", ROUTINGS, ids=str)
def test_the_rows_that_two_layers_of_a_pass_drop_are_independent(options):
    one, other = (2 * dropped([make_layer(**options), make_layer(**options)]) - 1).unbind(1)
    correlations = (one * other).mean(1)  # by pass; the deviation of each is 1 / sqrt(ROWS - 1)
    assert correlations.mean().abs() < 4.5 / (PASSES * ROWS) ** 0.5
    assert correlations.abs().max() < 4.5 / ROWS**0.5


@pytest.mark.parametrize("options", ROUTINGS, ids=str)
@pytest.mark.parametrize("training, factor", [(False, 0.5), (True, 2.0)])
def test_nothing_is_drawn_in_evaluation_or_where_every_expert_has_room_for_all_tokens(options, training, factor):
    layer = make_layer(**options, **{"capacity_factor" if training else "eval_capacity_factor": factor})
    state = torch.get_rng_state()
    layer.train(training)(torch.ones(ROWS, D))
    assert torch.equal(torch.get_rng_state(), state)


def test_with_priority_only_the_last_slots_among_equal_probabilities_are_drawn():
    layer = make_layer(priority=True, top_k=1, num_experts=2, normalize_gates="none")
    torch.nn.init.eye_(layer.router.weight)
    x = torch.zeros(8, D)
    x[:, 0] = torch.tensor([1.0, 2, 2, 2, 2, 3, 3, 4])  # for four slots
    kept = torch.stack([layer(x, return_routing=True)[1].kept[:, 0] for _ in range(50)])
    assert kept[:, 5:].all() and (kept[:, 1:5].sum(1) == 1).all() and kept.any(0).tolist() == [False] + [True] * 7
