"""Experts' biases and norms have no weight decay, whoever makes the optimizer."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from tiny_clip import tiny_clip
from torch import nn

from clipup import MoEConfig, SparseMoE, moe_layers, parameter_groups, upcycle

D = 12
VECTORS = {"in_bias", "out_bias", "gate_bias", "ln_weight", "ln_bias"}
KINDS = ("gelu", "custom_text", "timm")


def vectors(model):
    """The full names of the experts' biases and norms."""
    named = [
        (f"{layer_name}.{name}".lstrip("."), parameter)
        for layer_name, layer in moe_layers(model).items()
        for name, parameter in layer.named_parameters()
    ]
    return {name for name, parameter in named if name.rpartition(".")[2] in VECTORS}


def decayed(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}


def by_timm(model):
    return decayed(model, create_optimizer_v2(model, opt="adamw", weight_decay=0.1).param_groups)


def timm_model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)


def sparse(kind, **options):
    config = MoEConfig(num_experts=4, **options)
    if kind == "timm model":
        return timm_model(), upcycle(timm_model(), config.replace(towers=("image",)))
    return tiny_clip(kind), upcycle(tiny_clip(kind), config)


@pytest.mark.parametrize(
    "options", [{}, {"gated": True}, {"norm": "layer"}, {"bias": False}, {"shared_expert": True, "granularity": 2}]
)
def test_layer_names_its_biases_and_norms(options):
    layer = SparseMoE(D, 16, num_experts=4, **options)
    assert layer.no_weight_decay() == vectors(layer)
    assert by_timm(layer) == {name for name, _ in layer.named_parameters()} - vectors(layer)


@pytest.mark.parametrize("kind", [*KINDS, "timm model"])
def test_timms_optimizer_decays_of_an_upcycled_model_what_it_decays_of_the_dense_one(kind):
    dense, model = sparse(kind, shared_expert=True)
    assert vectors(model) and vectors(model) <= model.no_weight_decay()
    assert dense.no_weight_decay() <= model.no_weight_decay()
    names = {name for name, _ in dense.named_parameters()}
    assert by_timm(model) & names == by_timm(dense) & {name for name, _ in model.named_parameters()}
    assert not by_timm(model) & vectors(model)
    for layer_name in moe_layers(model):
        assert {f"{layer_name}.in_weight", f"{layer_name}.router.weight"} <= by_timm(model)


@pytest.mark.parametrize("kind", [*KINDS, "timm model"])
def test_parameter_groups_are_those_of_open_clip_train(kind):
    model = sparse(kind)[1]
    model.get_parameter("logit_scale" if kind != "timm model" else "pos_embed").requires_grad_(False)

    def exclude(name, parameter):  # open_clip_train/main.py
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    expected = {name for name, p in model.named_parameters() if p.requires_grad and not exclude(name, p)}
    groups = parameter_groups(model, 0.2)
    assert decayed(model, groups) == expected and not expected & vectors(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(p) for group in groups for p in group["params"])
    torch.optim.AdamW(groups, lr=1e-4)


def test_words_of_a_name_exempt_it_from_weight_decay_and_letters_inside_a_word_do_not():
    names = ["subnet.weight", "channelnet", "lns.0", "biased_scale", "bnb", "logit_scales.weight"]
    exempt = ["ln_1.weight", "block.bn2", "in_bias", "relative_position_bias_table", "ln", "bias_k", "x.logit_scale"]
    exempt += ["attention_biases"]
    model = nn.Module()
    for name in names + exempt:
        *path, last = name.split(".")
        part = model
        for module in path:
            part.add_module(module, part := nn.Module())
        part.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    assert decayed(model, parameter_groups(model, 0.1)) == set(names)
