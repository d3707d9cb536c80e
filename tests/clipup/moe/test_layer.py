import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clipup
from clipup import MoEConfig, SparseMoE, aux_loss, moe_metrics
from clipup_kernels import ACTIVATIONS
from clipup_kernels.reference import activate

D, H, E, K = 12, 20, 4, 2


def make_layer(seed=0, **options):
    torch.manual_seed(seed)
    layer = SparseMoE(D, H, **{"num_experts": E, "top_k": K, **options})
    with torch.no_grad():
        layer.router.weight.mul_(30)
    return layer


def by_hand(layer, x):
    """The definition, token by token in float64, nothing dropped."""
    p = {name: parameter.double() for name, parameter in layer.named_parameters()}
    outputs = []
    for token in x.reshape(-1, D).double():
        probs = (p["router.weight"] @ token).softmax(-1)
        gates, experts = probs.topk(layer.config.top_k)
        gates = gates / gates.sum()
        y = torch.zeros_like(token)
        for gate, e in zip(gates, experts, strict=True):
            z = F.linear(token, p["in_weight"][e], p["in_bias"][e] if "in_bias" in p else None)
            if "gate_weight" in p:
                gate_bias = p["gate_bias"][e] if "gate_bias" in p else None
                a = activate(F.linear(token, p["gate_weight"][e], gate_bias), layer.activation) * z
            else:
                a = activate(z, layer.activation)
            y = y + gate * F.linear(a, p["out_weight"][e], p["out_bias"][e] if "out_bias" in p else None)
        outputs.append(y)
    return torch.stack(outputs).view(x.shape)


FORMS = [{"bias": False}, {"gated": True}, {"gated": True, "bias": False}, {"top_k": E}]
HALVES = [({"dtype": torch.bfloat16}, 2e-2), ({"dtype": torch.float16}, 3e-3)]
FULL = [(options, 1e-5) for options in (*({"activation": name} for name in ACTIVATIONS), *FORMS)]


@pytest.mark.parametrize(("options", "tolerance"), FULL + HALVES, ids=str)
def test_layer_computes_its_definition(options, tolerance):
    layer = make_layer(**options)
    x = torch.randn(3, 5, D, dtype=layer.in_weight.dtype)
    y = layer(x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), by_hand(layer, x), rtol=1e-4, atol=tolerance)


def test_gradients_are_those_of_the_definition():
    layer, x = make_layer(gated=True).double(), torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, D, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    found = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    expected = torch.autograd.grad((by_hand(layer, x) * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_every_expert_is_drawn_like_a_linear_layer_of_its_own():
    layer = SparseMoE(256, 1024, num_experts=2)
    linear_in, linear_out = nn.Linear(256, 1024), nn.Linear(1024, 256)
    for stacked, linear in ((layer.in_weight, linear_in.weight), (layer.out_weight, linear_out.weight)):
        for expert in stacked:
            assert expert.std().item() == pytest.approx(linear.std().item(), rel=0.02)
            assert expert.abs().max().item() == pytest.approx(linear.abs().max().item(), rel=0.02)
        assert not torch.equal(stacked[0], stacked[1])
    assert layer.out_bias.abs().max().item() <= linear_out.weight.abs().max().item()


def test_reset_parameters_draws_everything_anew():
    layer = make_layer(gated=True)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_mask_of_integers_means_what_a_tokenizer_means(dtype):
    layer, x = make_layer(), torch.randn(4, 6, D)
    mask = torch.rand(4, 6) > 0.4
    assert torch.equal(layer(x, mask.to(dtype)), layer(x, mask))


def test_masked_tokens_change_nothing_for_the_others():
    layer = make_layer(capacity_factor=1.0, balance_weight=0.01, z_weight=0.01)
    x = torch.randn(4, 6, D)
    mask = torch.rand(4, 6) > 0.4
    alone = layer(x[mask])
    loss_alone = aux_loss(layer)
    together = layer(x, mask)[mask]
    assert torch.equal(alone, together)
    torch.testing.assert_close(aux_loss(layer), loss_alone)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (1, D), (D,)])
def test_few_tokens_and_none_are_served(shape):
    layer = make_layer(capacity_factor=1.0, balance_weight=0.1)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    (y.sum() + aux_loss(layer)).backward()
    assert y.shape == x.shape and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_capacity_drops_in_training_and_nothing_in_evaluation():
    layer = make_layer(capacity_factor=0.5)
    x = torch.randn(64, D)
    dropless = make_layer()(x)
    assert not torch.allclose(layer(x), dropless)
    assert torch.equal(layer.eval()(x), dropless)
    halves = torch.cat([layer(x[:20]), layer(x[20:])])
    torch.testing.assert_close(halves, dropless)


def test_another_config_takes_effect_at_the_next_forward():
    layer = make_layer()
    x = torch.randn(64, D)
    before = layer(x)
    layer.config = layer.config.replace(top_k=4)
    assert not torch.allclose(layer(x), before)
    for change in ({"num_experts": 8}, {"granularity": 2}, {"shared_expert": True}, {"selection_bias": "sign"}):
        with pytest.raises(ValueError, match=f"config.{next(iter(change))} is .*, but the layer was made with"):
            layer.config = layer.config.replace(**change)


def test_autocast_runs_experts_in_half_precision_and_routes_in_float32():
    layer = make_layer(balance_weight=0.1)
    x = torch.randn(64, D)
    exact = layer(x)
    routing, loss = layer.state.last_routing, aux_loss(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.state.last_routing.logits, routing.logits)
        torch.testing.assert_close(aux_loss(layer), loss)
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_meta_device_costs_nothing_and_gives_shapes():
    layer = SparseMoE(D, H, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert layer(torch.empty(3, 5, D, device="meta", dtype=torch.bfloat16)).shape == (3, 5, D)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.randn(3, D, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_carry_no_losses(duplicate):
    layer = make_layer(balance_weight=0.1)
    x = torch.randn(7, D)
    y = layer(x)
    copied = duplicate(layer)
    assert aux_loss(copied) == 0 and copied.state.last_routing is None
    assert torch.equal(copied(x), y)
    assert not any("last_routing" in name for name in layer.state_dict())
    assert aux_loss(layer) > 0


def test_a_layer_takes_a_config_and_fields_in_place_of_its_own():
    config = MoEConfig.clip_up(num_experts=4)
    assert SparseMoE(D, H, config).config == config
    assert SparseMoE(D, H, config, top_k=1).config == config.replace(top_k=1)
    assert SparseMoE(D, H, num_experts=4).config == MoEConfig(num_experts=4)


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.zeros(3, D + 1), None, ValueError, "x must be"),
        (torch.zeros(()), None, ValueError, "x must be"),
        (torch.zeros(3, D, dtype=torch.bfloat16), None, TypeError, "x is torch.bfloat16"),
        (torch.zeros(3, D), torch.ones(3), TypeError, "mask must be"),
        (torch.zeros(2, 3, D), torch.ones(6, dtype=torch.bool), ValueError, "mask must have"),
    ],
)
def test_bad_inputs_are_refused_by_name(x, mask, error, message):
    with pytest.raises(error, match=message):
        make_layer()(x, mask)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": 5}, ValueError),
        ({"activation": "tanh"}, ValueError),
        ({"norm": "rms"}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"d_model": 0}, ValueError),
        ({"d_hidden": 2.5}, ValueError),
        ({"config": 8}, TypeError),
        ({"num_expert": 8}, TypeError),
        ({"towers": ("text",)}, TypeError),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, error):
    with pytest.raises(error, match=next(iter(options))):
        SparseMoE(**{"d_model": D, "d_hidden": H, "num_experts": E, **options})


def test_the_output_is_the_gated_sum_over_the_kept_choices():
    layer = make_layer(capacity_factor=0.5).train()
    x = torch.randn(3, 7, D)

    y, routing = layer(x, return_routing=True)

    assert torch.equal(y, layer(x))
    assert routing.gates.shape == routing.experts.shape == routing.kept.shape == (3, 7, 2)
    assert routing.kept.any() and not routing.kept.all()
    expected = torch.zeros_like(x)
    for expert in range(4):
        z = torch.nn.functional.gelu(x @ layer.in_weight[expert].T + layer.in_bias[expert])
        out = z @ layer.out_weight[expert].T + layer.out_bias[expert]
        share = (routing.gates * (routing.experts == expert) * routing.kept).sum(-1, keepdim=True)
        expected += share * out
    torch.testing.assert_close(y, expected)


def test_every_form_of_the_layer_returns_its_routing():
    layer = make_layer(shared_expert=True, capacity_factor=None).eval()
    x = torch.randn(2, 5, D)
    y, routing = layer(x, return_routing=True)
    for other in (
        copy.deepcopy(layer),
        clipup.accelerate(layer),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
    ):
        found, same = other(x, return_routing=True)
        torch.testing.assert_close(found, y)
        assert torch.equal(same.experts, routing.experts) and torch.equal(same.kept, routing.kept)


T = 40


@pytest.mark.parametrize("training", [True, False])
def test_metrics_say_what_the_last_forward_did(training):
    layer = make_layer(capacity_factor=0.5, balance="top2").train(training)
    layer(torch.randn(3, D))
    x = torch.randn(2, T // 2, D)
    layer(x)
    metrics = moe_metrics(nn.ModuleDict({"first": layer, "second": make_layer()}))["first"]
    probs = (x.view(T, D) @ layer.router.weight.T).softmax(-1)
    experts = probs.topk(K).indices
    counts = torch.bincount(experts.flatten(), minlength=E)
    assert torch.equal(metrics["expert_indices"].long(), experts)
    torch.testing.assert_close(metrics["load"], counts / (K * T))
    capacity = math.ceil(0.5 * K * T / E)
    dropped = (counts - capacity).clamp_min(0).sum().item() / (K * T) if training else 0
    assert metrics["dropped"].item() == pytest.approx(dropped)
    torch.testing.assert_close(metrics["router_entropy"], -(probs * probs.log()).sum(-1).mean())
    first = torch.bincount(experts[:, 0], minlength=E) / T
    torch.testing.assert_close(metrics["balance"], E * (first * probs.mean(0)).sum())
    torch.testing.assert_close(metrics["z"], (x.view(T, D) @ layer.router.weight.T).logsumexp(-1).square().mean())
