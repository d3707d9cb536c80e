import pytest
import torch

from clipup import MoEConfig
from clipup.moe import losses
from clipup.moe.config import LOSS_WEIGHTS
from clipup.moe.router import Router, renormalize_kept, weighted_losses

T, D, E, K = 48, 16, 6, 2


def make_router(training=True, **options):
    torch.manual_seed(0)
    router = Router(D, MoEConfig(**{"num_experts": E, "top_k": K, **options}))
    with torch.no_grad():
        router.weight.mul_(20)  # decided tokens: ties and near-ties are the op's business
    return router.train(training)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(T, D)


def kept(routing):
    return routing.plan.row_of_choice >= 0


def test_gates_are_softmax_over_all_experts(x):
    router = make_router(normalize_gates="none")
    routing = router(x)
    probs = (x @ router.weight.T).softmax(-1)
    values, experts = probs.topk(K, -1)
    torch.testing.assert_close(routing.gates, values)
    assert torch.equal(routing.gating.expert_indices.long(), experts)


def test_sigmoid_gates_are_those_of_deepseek_v3(x):
    router = make_router(score_function="sigmoid")
    routing = router(x)
    scores = (x.double() @ router.weight.double().T).sigmoid()
    values, experts = scores.topk(K, -1)
    torch.testing.assert_close(routing.gates.double(), values / values.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert torch.equal(routing.gating.expert_indices.long(), experts)
    shares = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.gating.mean_probs.double(), shares.mean(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(routing.gates, make_router()(x).gates, atol=1e-2)


def test_losses_under_sigmoid_gates_are_of_its_probabilities_and_of_the_raw_logits(x):
    router = make_router(score_function="sigmoid", z_weight=1.0)
    routing = router(x)
    assert weighted_losses(routing, router.config).item() == pytest.approx(losses.router_z(routing.logits).item())
    probs = routing.logits.sigmoid() / routing.logits.sigmoid().sum(-1, keepdim=True)
    entropy = -(probs * probs.log()).sum(-1).mean()
    config = router.config.replace(z_weight=0.0, local_entropy_weight=1.0)
    assert weighted_losses(routing, config).item() == pytest.approx(entropy.item(), rel=1e-5)
    config = router.config.replace(z_weight=0.0, importance_weight=1.0)
    assert weighted_losses(routing, config).item() == pytest.approx(losses.importance(probs.mean(0)).item(), rel=1e-4)


def test_before_drop_gates_sum_to_one_with_dropped_choices_counted(x):
    routing = make_router(normalize_gates="before_drop", capacity_factor=0.5)(x)
    assert not kept(routing).all()
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(T))


def test_after_drop_gates_sum_to_one_over_kept_choices_and_are_zero_where_none_is(x):
    routing = make_router(normalize_gates="after_drop", capacity_factor=0.5)(x)
    has_slot = kept(routing).any(-1)
    assert not has_slot.all() and not kept(routing).all(-1).all()
    torch.testing.assert_close(routing.gates.sum(-1), has_slot.float())
    assert torch.equal(routing.gates[~kept(routing)], torch.zeros_like(routing.gates[~kept(routing)]))


def test_the_only_gate_after_dropping_is_one_however_improbable_the_choice():
    router = make_router(num_experts=3, normalize_gates="after_drop", capacity_factor=0.5)
    router.logits = lambda x, mask: torch.tensor([[0.0, -300, -104]] * 2 + [[0, -104, -300]] * 2)
    routing = router(torch.zeros(4, D))
    assert kept(routing).tolist() == [[True, True]] * 2 + [[False, True]] * 2
    assert routing.gates.tolist() == [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2


def test_after_drop_gradient_agrees_with_finite_differences(x):
    routing = make_router(capacity_factor=0.5)(x)
    scores = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: renormalize_kept(s, routing.gating, routing.plan), scores)


def test_slots_go_by_position_or_by_the_largest_probability(x):
    by_position = make_router(capacity_factor=0.5)(x)
    by_priority = make_router(capacity_factor=0.5, priority=True)(x)
    for routing, key in ((by_position, -torch.arange(T).float()), (by_priority, by_priority.gating.top_prob)):
        for expert in range(E):
            first = routing.gating.expert_indices[:, 0] == expert
            got, lost = key[first & kept(routing)[:, 0]], key[first & ~kept(routing)[:, 0]]
            assert lost.numel() == 0 or got.min() >= lost.max()


def test_noise_has_the_stated_deviation_and_only_in_training(x):
    router = make_router(router_noise=3.0)
    big = x.repeat(200, 1)
    noise = router(big).noisy_logits - router(big).logits
    assert noise.std().item() == pytest.approx(3.0 / E, rel=0.02)
    quiet = router.eval()(x)
    assert quiet.noisy_logits is quiet.logits
    assert make_router(router_noise=0.0)(x).noisy_logits.equal(make_router()(x).logits)


def test_only_losses_with_a_weight_are_summed(x):
    weights = {name: 0.25 * (index + 1) for index, name in enumerate(LOSS_WEIGHTS)}
    router = make_router(router_noise=1.0, **weights)
    torch.manual_seed(2)
    routing = router(x)
    none = dict.fromkeys(LOSS_WEIGHTS, 0.0)
    parts = {
        name: weighted_losses(routing, router.config.replace(**{**none, name: weight})).item()
        for name, weight in weights.items()
    }
    assert all(value > 0 for value in parts.values())
    assert weighted_losses(routing, router.config).item() == pytest.approx(sum(parts.values()), rel=1e-5)
    assert parts["z_weight"] == pytest.approx(weights["z_weight"] * routing.gating.z_loss.item())


def test_importance_is_of_the_router_without_noise(x):
    router = make_router(router_noise=50.0, importance_weight=1.0)
    probs = (x @ router.weight.T).softmax(-1).mean(0)
    expected = (probs.var(correction=0) / probs.mean() ** 2).item()
    assert weighted_losses(router(x), router.config).item() == pytest.approx(expected, rel=1e-4)
