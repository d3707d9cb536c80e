import copy
import itertools
import math

import pytest
import timm
import torch
from tiny_clip import CONFIGS, build, tiny_clip, tiny_config
from tiny_families import timm_model
from torch import nn

from clipup import MoEConfig, moe_layers, step0_difference, upcycle
from clipup.clip.inputs import random_inputs

CONFIG = MoEConfig.clip_up(num_experts=4, towers=("image", "text"))


SHARDS = {"num_experts": 16, "top_k": 8, "granularity": 4}
ROUTINGS = [
    {},
    {"normalize_gates": "after_drop"},
    {"top_k": 1},
    {"top_k": 4},
    {"priority": True, "shared_expert": True},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "normalize_gates": "after_drop", "top_k": 3},
    {"selection_bias": "sign"},
    {"selection_bias": "z_score", "score_function": "sigmoid"},
    {"shared_expert": True, "normalize_gates": "after_drop"},
    SHARDS,
    SHARDS | {"granularity": 8, "score_function": "sigmoid"},
    SHARDS | {"top_k": 4, "shared_expert": True},
]


@pytest.mark.parametrize(("kind", "options"), [*zip(itertools.cycle(CONFIGS), ROUTINGS)])
def test_upcycled_model_equals_dense_at_step_zero(kind, options):
    dense = tiny_clip(kind)
    sparse = upcycle(dense, CONFIG.replace(**options))
    assert step0_difference(dense, sparse) <= 1e-6
    inputs = random_inputs(dense, 5, seed=7)
    torch.testing.assert_close(sparse.eval()(*inputs)[:2], dense.eval()(*inputs)[:2])


def test_step_zero_check_detects_differences():
    dense = tiny_clip()
    assert step0_difference(dense, upcycle(dense, CONFIG.replace(normalize_gates="none"))) > 1e-3
    sparse = upcycle(dense, CONFIG)
    with torch.no_grad():
        next(iter(moe_layers(sparse).values())).out_bias *= 2
    assert step0_difference(dense, sparse) > 1e-3
    with torch.no_grad():
        next(iter(moe_layers(sparse).values())).out_bias.fill_(float("nan"))
    assert math.isnan(step0_difference(dense, sparse))


def test_step_zero_check_is_dropless_and_restores_modes_and_configs():
    dense = tiny_clip()
    sparse = upcycle(dense, CONFIG.replace(eval_capacity_factor=0.25))
    sparse.visual.eval()
    images, texts = random_inputs(dense, 4)
    assert step0_difference(dense, sparse, images=images) <= 1e-6
    assert step0_difference(dense, sparse, texts=texts) <= 1e-6
    assert sparse.training and not sparse.visual.training and dense.training
    assert all(layer.config.eval_capacity_factor == 0.25 for layer in moe_layers(sparse).values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"towers": ("text",)}, {"transformer.resblocks.1.mlp", "transformer.resblocks.3.mlp"}),
        ({"towers": ("image",), "blocks": (-1,)}, {"visual.transformer.resblocks.3.mlp"}),
        ({"blocks": "every", "towers": ("text",)}, {f"transformer.resblocks.{i}.mlp" for i in range(4)}),
        ({"last_blocks": 1}, {f"{tower}transformer.resblocks.3.mlp" for tower in ("", "visual.")}),
        (
            {"blocks": "every", "last_blocks": 3, "towers": ("image",)},
            {f"visual.transformer.resblocks.{i}.mlp" for i in (1, 2, 3)},
        ),
        ({"blocks": (2, 0)}, {f"{tower}transformer.resblocks.{i}.mlp" for tower in ("", "visual.") for i in (0, 2)}),
    ],
)
def test_towers_and_blocks_can_be_selected(options, expected):
    sparse = upcycle(tiny_clip(), CONFIG.replace(**options))
    assert set(moe_layers(sparse)) == expected
    assert all(layer.config == sparse.moe_config for layer in moe_layers(sparse).values())


def test_model_is_copied_unless_inplace():
    dense = tiny_clip()
    before = copy.deepcopy(dense.state_dict())
    sparse = upcycle(dense, CONFIG)
    assert not moe_layers(dense) and not hasattr(dense, "moe_config")
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert upcycle(dense, CONFIG, inplace=True) is dense and moe_layers(dense)


def test_dtype_training_mode_and_requires_grad_are_kept():
    dense = tiny_clip().bfloat16()
    dense.visual.eval().requires_grad_(False)
    sparse = upcycle(dense, CONFIG)
    assert all(parameter.dtype == torch.bfloat16 for parameter in sparse.parameters())
    assert not any(module.training for module in sparse.visual.modules())
    assert not any(parameter.requires_grad for parameter in sparse.visual.parameters())
    assert all(module.training for module in sparse.transformer.modules())
    assert all(parameter.requires_grad for parameter in sparse.transformer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_zero_can_be_sparse_in_every_dtype(dtype):
    dense = tiny_clip().to(dtype)
    sparse = upcycle(dense, CONFIG.replace(blocks=(0, 2)))
    assert sparse.transformer.get_cast_dtype() == dtype
    assert step0_difference(dense, sparse) <= {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8}
NORMED = CONFIG.replace(granularity=2, towers=("image",))
REFUSED = [
    (
        lambda: build({**tiny_config(), "vision_cfg": RESNET}),
        CONFIG,
        TypeError,
        "the image tower .* has no list of transformer blocks; .*--towers text",
    ),
    (lambda: tiny_clip(text_cfg={"layers": 1}), CONFIG, ValueError, "blocks='every_other' selects none"),
    (tiny_clip, CONFIG.replace(blocks=(1, 4)), ValueError, r"blocks names \[4\]"),
    (tiny_clip, CONFIG.replace(blocks=(3, -1)), ValueError, "blocks=.* twice"),
    (tiny_clip, CONFIG.replace(last_blocks=3), ValueError, "last_blocks is 3"),
    (tiny_clip, CONFIG.replace(num_experts=3, top_k=3, granularity=3), ValueError, "resblocks.1: granularity is 3"),
    (lambda: timm_model("Block/Mlp, normed"), NORMED, TypeError, r"blocks\.1: granularity is 2, but a norm"),
    (lambda: upcycle(tiny_clip(), CONFIG), CONFIG, ValueError, r"already sparse \(visual.* and 3 more\)"),
    (lambda: nn.Linear(2, 2), CONFIG, TypeError, "a model of timm or transformers, got Linear"),
    (lambda: nn.DataParallel(tiny_clip()), CONFIG, TypeError, "without a wrapper, got DataParallel"),
]


@pytest.mark.parametrize(("make", "config", "error", "message"), REFUSED)
def test_unsupported_models_and_configs_are_refused_and_the_model_is_unchanged(make, config, error, message):
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        upcycle(model, config, inplace=True)
    assert [type(module) for module in model.modules()] == before


SEVERAL = MoEConfig.clip_up(num_experts=5, capacity_factor=None)


@pytest.mark.parametrize(("experts", "granularity"), [(5, 1), (6, 2)])
def test_groups_of_experts_are_the_mlps_of_the_models_in_turn(experts, granularity):
    dense = [tiny_clip(seed=seed) for seed in range(2)]
    sparse = upcycle(dense, SEVERAL.replace(num_experts=experts, granularity=granularity))
    assert len(moe_layers(sparse)) == 4
    for name, layer in moe_layers(sparse).items():
        for group in range(experts // granularity):
            mlp, mine = dense[group % 2].get_submodule(name), slice(granularity * group, granularity * (group + 1))
            assert torch.equal(layer.in_weight[mine].flatten(0, 1), mlp.c_fc.weight)
            assert torch.equal(layer.in_bias[mine].flatten(), mlp.c_fc.bias)
            assert torch.equal(torch.cat(list(layer.out_weight[mine]), 1), mlp.c_proj.weight)
            torch.testing.assert_close(layer.out_bias[mine].sum(0), mlp.c_proj.bias)
    assert torch.equal(sparse.token_embedding.weight, dense[0].token_embedding.weight)


def test_experts_of_all_models_are_reinitialized():
    dense = [tiny_clip(seed=seed) for seed in range(2)]
    for name, layer in moe_layers(upcycle(dense, SEVERAL.replace(reinit_ratio=0.5))).items():
        for expert, weight in enumerate(layer.in_weight):
            kept = (weight == dense[expert % 2].get_submodule(name).c_fc.weight).all(1)
            assert kept.sum() == len(kept) / 2


def test_several_copies_of_one_model_keep_its_function():
    dense = tiny_clip()
    assert step0_difference(dense, upcycle([dense, dense, dense], SEVERAL)) <= 2e-6
    assert torch.equal(*(next(iter(moe_layers(upcycle(m, SEVERAL)).values())).in_weight for m in ([dense], dense)))


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        (lambda: [tiny_clip("quick_gelu")], ValueError, "models must be of one architecture"),
        (lambda: [upcycle(tiny_clip(), SEVERAL)], ValueError, "already sparse"),
        (lambda: ["ViT-B-32"], TypeError, "model must be"),
        (lambda: [tiny_clip()] * SEVERAL.num_experts, ValueError, "model is a list of"),
    ],
)
def test_models_that_do_not_belong_together_are_refused_and_nothing_is_changed(others, error, message):
    first = tiny_clip()
    with pytest.raises(error, match=message):
        upcycle([first, *others()], SEVERAL, inplace=True)
    assert not moe_layers(first)
    with pytest.raises(ValueError, match="model is an empty list"):
        upcycle([], SEVERAL)


def test_a_features_only_model_of_timm_is_refused_with_the_model_in_it():
    net = timm.create_model("vit_tiny_patch16_224", features_only=True)
    with pytest.raises(TypeError, match="net.model"):
        upcycle(net)
    upcycle(net.model, inplace=True)
    assert moe_layers(net) and len(net(torch.randn(1, 3, 224, 224))) == 3
