"""``SparseMoE`` against its definition, written out in float64, and how it is made, copied, cast and refused."""

import copy
import itertools
import math
import pickle
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from moe_cases import assert_follows, pairwise
from torch import nn

import clipup
from clipup import MoEConfig, SparseMoE, aux_loss, moe_metrics
from clipup.moe.config import RoutingKind
from clipup_kernels import ACTIVATIONS
from clipup_kernels.reference import activate

D, H, E, K, T = 12, 20, 4, 2, 21


def make_layer(seed=0, **options):
    torch.manual_seed(seed)
    layer = SparseMoE(D, H, **{"num_experts": E, "top_k": K, **options})
    with torch.no_grad():
        layer.router.weight.mul_(30)
        for name, parameter in layer.named_parameters():
            if "ln_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if layer.router.selection_bias is not None:
            layer.router.selection_bias.normal_()
    return layer


def expert_output(experts, number, x):
    p = {name: value[number].double() for name, value in experts.named_parameters(recurse=False)}
    hidden = F.linear(x, p["in_weight"], p.get("in_bias"))
    if "gate_weight" in p:
        hidden = activate(F.linear(x, p["gate_weight"], p.get("gate_bias")), experts.activation) * hidden
    else:
        hidden = activate(hidden, experts.activation)
    if "ln_weight" in p:
        hidden = F.layer_norm(hidden, (experts.d_hidden,), p["ln_weight"], p["ln_bias"], experts.norm_eps)
    return F.linear(hidden, p["out_weight"], p.get("out_bias"))


def choices(layer, probs, able, draw):
    """The choices that are made and those that get a slot, [K, T, E]; where experts choose, K is 1. draw: [T], the
    random numbers that decide in training who is dropped."""
    config, shape = layer.config, (*probs.shape,)
    factor = config.capacity_factor if layer.training else config.eval_capacity_factor
    if config.routing == "expert_choice":
        factor = config.capacity_factor if factor is None else factor
        places = math.ceil((factor or 1.0) * config.top_k * len(able) / shape[1])
        made = torch.zeros(1, *shape, dtype=torch.bool)
        for e in range(shape[1]):
            made[0, sorted(able, key=lambda t: -probs[t, e].item())[:places], e] = True
        return made, made
    places = math.inf if factor is None else math.ceil(factor * config.top_k * len(able) / shape[1])
    biased = probs if layer.router.selection_bias is None else probs + layer.router.selection_bias
    ranked = biased.argsort(-1, descending=True)
    line = able if draw is None or not layer.training else sorted(able, key=lambda t: -draw[t].item())
    line = sorted(line, key=lambda t: -probs[t].max().item()) if config.priority else line
    made = torch.zeros(config.top_k, *shape, dtype=torch.bool)
    kept = made.clone()
    for k, t in itertools.product(range(config.top_k), line):
        e = ranked[t, k]
        made[k, t, e] = True
        kept[k, t, e] = kept[:, :, e].sum() < places
    return made, kept


def entropy(probs):
    return -(probs * probs.log()).sum(-1)


def definition(layer, x, mask, draw=None):
    """y [T, D], the gates of the choices that got a slot [T, E], the metrics, and the weighted losses."""
    config, count = layer.config, layer.config.num_experts
    x = x.double().where(mask[:, None], 0)
    logits = x @ layer.router.weight.double().T
    scores = logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(-1)
    probs = scores / scores.sum(-1, keepdim=True)
    made, kept = choices(layer, probs, mask.nonzero().flatten().tolist(), draw)
    gates = probs * kept.any(0)
    if config.normalize_gates != "none":
        summed = kept if config.normalize_gates == "after_drop" else made
        gates = gates / (probs * summed.any(0)).sum(-1, keepdim=True).clamp_min(1e-30)
    y = config.granularity * sum(gates[:, [e]] * expert_output(layer, e, x) for e in range(count))
    if layer.shared is not None:
        y = (y + mask[:, None] * expert_output(layer.shared, 0, x)) / 2

    probs, logits, made_by, mean = probs[mask], logits[mask], made.sum(1).double(), probs[mask].mean(0)
    share = (made_by[: config.granularity] if config.balance == "top2" else made_by).sum(0)
    dropped = 1 - kept.sum() / made.sum()
    if config.routing == "expert_choice":
        dropped = (~made.any(0).any(-1))[mask].double().mean()
    metrics = {
        "load": made_by.sum(0) / made_by.sum(),
        "dropped": dropped,
        "router_entropy": entropy(probs).mean(),
        "balance": count * (share / share.sum()) @ mean,
        "z": logits.logsumexp(-1).square().mean(),
    }
    losses = [
        config.balance_weight * metrics["balance"],
        config.z_weight * metrics["z"],
        config.local_entropy_weight * metrics["router_entropy"],
        config.importance_weight * mean.var(correction=0) / mean.mean().square(),
        config.global_entropy_weight * (config.global_entropy_threshold - entropy(mean)).clamp_min(0),
    ]
    return y, gates, metrics, sum(losses)


ROUTINGS = {
    "dropless": {},
    "capacity": {"capacity_factor": 0.6, "eval_capacity_factor": 0.5},
    "priority": {"capacity_factor": 0.5, "eval_capacity_factor": 0.6, "priority": True},
    "biased": {"selection_bias": "sign"},
    "shards": {"num_experts": 2 * E, "granularity": 2},
    "experts choose": {"routing": "expert_choice"},
    "experts choose few": {"routing": "expert_choice", "capacity_factor": 0.4},
    "experts choose all": {"routing": "expert_choice", "capacity_factor": 0.3, "eval_capacity_factor": 9.0},
}
FORMS = {
    **{name: {"activation": name} for name in ACTIVATIONS},
    "no bias": {"bias": False, "shared_expert": True},
    "gated": {"gated": True, "shared_expert": True},
    "gated, no bias": {"gated": True, "bias": False},
    "norm": {"norm": "layer", "norm_eps": 1e-3, "shared_expert": True},
    "gated norm": {"norm": "layer", "norm_eps": 1e-6, "gated": True, "activation": "silu"},
}
WEIGHTS = {"balance_weight": 0.5, "z_weight": 0.25, "local_entropy_weight": 0.7, "importance_weight": 0.3}
GATES = {
    "none": {"normalize_gates": "none", "global_entropy_weight": 2.0, "entropy_threshold": 0.9},
    "before_drop": {"normalize_gates": "before_drop", "balance": "top2", "global_entropy_weight": 0.9},
    "after_drop": {"normalize_gates": "after_drop", **dict.fromkeys(WEIGHTS, 0.0), "z_weight": 1.0},
}
CASES = pairwise(
    routing=ROUTINGS,
    form=FORMS,
    gates=GATES,
    k=(1, 2, 4),
    score=("softmax", "sigmoid"),
    how=(("train", "all"), ("train", "masked"), ("eval", "all"), ("eval", "masked")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_layer_and_its_gradients_losses_and_metrics_are_those_of_its_definition(case):
    routing, (mode, masked) = ROUTINGS[case["routing"]], case["how"]
    options = FORMS[case["form"]] | routing | WEIGHTS | GATES[case["gates"]] | {"score_function": case["score"]}
    layer = make_layer(top_k=case["k"] * routing.get("granularity", 1), dtype=torch.float64, **options)
    layer.train(mode == "train")
    x, mask = torch.randn(T, D, dtype=torch.float64), torch.arange(T) % 3 > 0 if masked == "masked" else None
    x = x.masked_fill(torch.zeros(T, 1, dtype=torch.bool) if mask is None else ~mask[:, None], torch.nan)
    leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}

    draw = torch.rand(T, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    found, routing = layer(x.view(3, 7, D), None if mask is None else mask.view(3, 7), return_routing=True)
    metrics, loss = moe_metrics(layer)[""], aux_loss(layer)
    every = torch.ones(T, dtype=torch.bool) if mask is None else mask
    y, gates, expected_metrics, expected_loss = definition(layer, x, every, draw)

    torch.testing.assert_close(found.view(T, D), y)
    at = F.one_hot(routing.experts.view(T, -1).clamp_min(0).long(), gates.shape[1]) * routing.kept.view(T, -1, 1)
    torch.testing.assert_close((at * routing.gates.view(T, -1, 1)).sum(1), gates)
    assert torch.equal(metrics["expert_indices"], routing.experts.flatten(0, 1)) and at.sum() == (gates > 0).sum()
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)
    expected_loss = expected_loss if layer.training else 0 * expected_loss
    torch.testing.assert_close(loss.double(), expected_loss)
    weights = torch.randn(T, D, dtype=torch.float64)
    results = [(found.view(T, D) * weights).sum() + loss, (y * weights).sum() + expected_loss]
    given = [torch.autograd.grad(result, tuple(leaves.values())) for result in results]
    for name, one, other in zip(leaves, *given, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["gelu", "gated", "norm"])
def test_every_type_follows_the_definition(form, dtype):
    layer, x = make_layer(dtype=dtype, **FORMS[form]), torch.randn(T, D, dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert_follows(found, definition(layer, x, torch.ones(T, dtype=torch.bool))[0], dtype)


def test_dropout_is_drawn_in_training_only_and_keeps_the_mean():
    layer, plain, x = make_layer(dropout=0.5), make_layer(), torch.randn(7, D)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(torch.stack([layer(x) for _ in range(400)]).mean(0), plain(x), rtol=0, atol=0.1)
    assert torch.equal(layer.eval()(x), plain(x))


def test_every_expert_is_drawn_like_a_linear_layer_of_its_own():
    layer = SparseMoE(256, 1024, num_experts=2)
    linear_in, linear_out = nn.Linear(256, 1024), nn.Linear(1024, 256)
    for stacked, linear in ((layer.in_weight, linear_in.weight), (layer.out_weight, linear_out.weight)):
        for expert in stacked:
            assert expert.std().item() == pytest.approx(linear.std().item(), rel=0.02)
            assert expert.abs().max().item() == pytest.approx(linear.abs().max().item(), rel=0.02)
        assert not torch.equal(stacked[0], stacked[1])
    assert layer.out_bias.abs().max().item() <= linear_out.weight.abs().max().item()


def test_reset_parameters_draws_everything_anew_and_norms_are_the_identity():
    layer = make_layer(gated=True, norm="layer", shared_expert=True)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer.ln_weight, torch.ones_like(layer.ln_weight)) and not layer.ln_bias.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_mask_of_integers_means_what_a_tokenizer_means(dtype):
    layer, x = make_layer(), torch.randn(4, 6, D)
    mask = torch.rand(4, 6) > 0.4
    assert torch.equal(layer(x, mask.to(dtype)), layer(x, mask))


@pytest.mark.parametrize(
    "options", [{"capacity_factor": 1.0}, {"routing": "expert_choice"}, {"norm": "layer"}], ids=str
)
@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (1, D), (D,)])
def test_few_tokens_and_none_are_served(shape, options):
    layer = make_layer(balance_weight=0.1, **options)
    x = torch.randn(shape, requires_grad=True)
    for mask in (None, torch.zeros(shape[:-1], dtype=torch.bool)):
        y = layer(x, mask)
        (y.sum() + aux_loss(layer)).backward()
        assert y.shape == x.shape and x.grad.isfinite().all() and (mask is None or not y.any())
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_change_of_the_output_in_place_keeps_its_gradient_and_hooks():
    layer, x = SparseMoE(8, 16, num_experts=4), torch.randn(2, 3, 8, requires_grad=True)
    called = []
    y = layer(x)
    y.register_hook(called.append)  # as FSDP2 does, which gathers the weights in it
    y += x
    y.sum().backward()
    layer(other := x.detach().requires_grad_()).add(other).sum().backward()
    assert called and x.grad.equal(other.grad)


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
        *(
            (torch.nested.nested_tensor([torch.zeros(3, D)], layout=layout), None, TypeError, "x is a nested tensor")
            for layout in (torch.strided, torch.jagged)
        ),
        (torch.zeros(3, D), torch.ones(3), TypeError, "mask must be"),
        (torch.zeros(2, 3, D), torch.ones(6, dtype=torch.bool), ValueError, "mask must have"),
    ],
)
def test_bad_inputs_are_refused_by_name(x, mask, error, message):
    with pytest.raises(error, match=message):
        make_layer()(x, mask)


NUMBERS = ("norm_eps", "dropout", "router_noise", "selection_bias_rate", "balance_weight", "entropy_threshold")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": 5}, ValueError),
        ({"activation": "tanh"}, ValueError),
        ({"norm": "rms"}, ValueError),
        ({"bias": None}, TypeError),
        ({"gated": 1}, TypeError),
        ({"shared_expert": "yes"}, TypeError),
        ({"dtype": torch.int64}, TypeError),
        ({"norm_eps": 0}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"dropout": True}, TypeError),
        ({"entropy_threshold": -5}, ValueError),
        ({"capacity_factor": math.inf}, ValueError),
        *(({name: "x"}, TypeError) for name in NUMBERS),
        *(({name: math.nan}, ValueError) for name in NUMBERS),
        ({"d_model": 0}, ValueError),
        ({"d_model": None}, ValueError),
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


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("rule", get_args(RoutingKind))
def test_the_config_says_of_every_routing_rule_how_many_experts_a_token_has_and_what_upcycling_keeps(
    rule, capacity_factor
):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
    config = MoEConfig(num_experts=E, top_k=K, routing=rule, capacity_factor=capacity_factor)
    layer, x = SparseMoE.from_dense(mlp, config).eval(), torch.randn(20, D)
    y, routing = layer(x, return_routing=True)
    experts = routing.kept.sum().item() / len(x)
    assert config.mean_choices - 1 < experts <= config.mean_choices
    assert torch.allclose(y, mlp(x), atol=1e-5) == config.keeps_function
