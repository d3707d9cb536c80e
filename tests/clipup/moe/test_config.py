import json

import numpy as np
import pytest

from clipup import MoEConfig
from clipup.moe.config import LOSS_WEIGHTS


def test_clip_up_preset_is_the_recipe():
    config = MoEConfig.clip_up()
    assert (config.num_experts, config.top_k, config.capacity_factor, config.eval_capacity_factor) == (8, 2, 1.0, None)
    assert (config.balance_weight, config.z_weight, config.balance) == (0.01, 1e-4, "top2")
    assert (config.towers, config.blocks, config.normalize_gates) == (None, "every_other", "before_drop")


def test_preset_takes_overrides():
    config = MoEConfig.clip_up(num_experts=4, capacity_factor=None)
    assert (config.num_experts, config.capacity_factor, config.balance_weight) == (4, None, 0.01)


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(),
        MoEConfig.clip_up(),
        MoEConfig(towers=("text",), blocks=(0, -1), router_noise=1.0, load_weight=0.1, entropy_threshold=1.5),
        MoEConfig(blocks="every", last_blocks=3, num_experts=32, top_k=8, granularity=4, shared_expert=True),
        MoEConfig(score_function="sigmoid", selection_bias="z_score", selection_bias_rate=0.01, reinit_ratio=0.5),
    ],
)
def test_json_round_trip_gives_an_equal_config(config):
    assert MoEConfig.from_json(config.to_json()) == config
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_missing_from_json_take_their_defaults():
    assert MoEConfig.from_dict({"num_experts": 4}) == MoEConfig(num_experts=4)


def test_config_saved_before_the_upcycling_choices_were_there_means_what_it_meant():
    old = {
        "num_experts": 8, "top_k": 2, "capacity_factor": 1.0, "eval_capacity_factor": None,
        "normalize_gates": "before_drop", "priority": False, "router_noise": 0.0, "towers": ["image", "text"],
        "blocks": "every_other", "padding_aware": True, "balance_weight": 0.01, "balance": "top2", "z_weight": 1e-4,
        "importance_weight": 0.0, "load_weight": 0.0, "local_entropy_weight": 0.0, "global_entropy_weight": 0.0,
        "entropy_threshold": None,
    }  # fmt: skip
    assert MoEConfig.from_dict(old) == MoEConfig.clip_up(towers=("image", "text"))


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({}, True),
        ({"granularity": 2, "shared_expert": True, "score_function": "sigmoid", "selection_bias": "sign"}, True),
        ({"normalize_gates": "after_drop"}, True),
        ({"normalize_gates": "none"}, False),
        ({"reinit_ratio": 0.1}, False),
    ],
)
def test_config_says_whether_the_upcycled_model_computes_the_dense_function(options, keeps):
    assert MoEConfig(**options).keeps_function is keeps


def test_unknown_fields_in_json_are_named():
    with pytest.raises(ValueError, match=r"unknown fields expert_count; known are num_experts, "):
        MoEConfig.from_dict({"expert_count": 4})
    with pytest.raises(TypeError, match="moe_cfg must be a JSON object, got list"):
        MoEConfig.from_dict([8, 2])


def test_config_is_hashable_and_frozen():
    assert hash(MoEConfig()) == hash(MoEConfig())
    with pytest.raises(AttributeError):
        MoEConfig().top_k = 1


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_every_weight_of_a_loss_is_checked_and_counts_as_a_loss(name):
    assert not MoEConfig(router_noise=1.0).has_losses
    assert MoEConfig(router_noise=1.0, **{name: 0.5}).has_losses
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got -1"):
        MoEConfig(router_noise=1.0, **{name: -1})


def test_threshold_of_global_entropy_defaults_to_the_uniform_distribution():
    assert MoEConfig(num_experts=8).global_entropy_threshold == pytest.approx(2.0794415)
    assert MoEConfig(entropy_threshold=1.0).global_entropy_threshold == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 9}, ValueError, r"top_k \(9\) is larger than num_experts \(8\)"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"num_experts": 0, "top_k": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_experts": 8.0}, TypeError, "num_experts must be an int, got 8.0"),
        ({"top_k": True}, TypeError, "top_k must be an int, got True"),
        ({"capacity_factor": 0}, ValueError, "capacity_factor must be positive, or None to drop nothing, got 0"),
        ({"capacity_factor": -1.0}, ValueError, "capacity_factor must be positive"),
        ({"capacity_factor": float("nan")}, ValueError, "capacity_factor must be finite, got nan"),
        ({"eval_capacity_factor": "2"}, TypeError, "eval_capacity_factor must be a number, got '2'"),
        ({"router_noise": -0.1}, ValueError, "router_noise must be 0 or more, got -0.1"),
        ({"balance_weight": -1}, ValueError, "balance_weight must be 0 or more, got -1"),
        ({"z_weight": float("inf")}, ValueError, "z_weight must be finite, got inf"),
        ({"normalize_gates": "after"}, ValueError, "normalize_gates must be one of none, before_drop, after_drop"),
        ({"balance": "top1"}, ValueError, "balance must be one of top2, topk, got 'top1'"),
        ({"priority": 1}, TypeError, "priority must be True or False, got 1"),
        ({"padding_aware": None}, TypeError, "padding_aware must be True or False, got None"),
        ({"towers": ()}, ValueError, "towers must be None, or a tuple of"),
        ({"towers": ("vision",)}, ValueError, r"towers must be None, or a tuple of .* got \('vision',\)"),
        ({"towers": "image"}, ValueError, "towers must be None, or a tuple of"),
        ({"blocks": "all"}, ValueError, 'blocks must be "every_other", "every" or a tuple of block indices'),
        ({"last_blocks": 0}, ValueError, "last_blocks must be at least 1, or None for all, got 0"),
        ({"last_blocks": 1.5}, TypeError, "last_blocks must be an int or None, got 1.5"),
        (
            {"last_blocks": 1, "blocks": (1, 2)},
            ValueError,
            "last_blocks=1 cannot be combined with a list of blocks",
        ),
        ({"granularity": 3}, ValueError, r"num_experts \(8\) is not a multiple of granularity \(3\)"),
        ({"granularity": 4}, ValueError, r"top_k \(2\) is not a multiple of granularity \(4\)"),
        ({"granularity": 0}, ValueError, "granularity must be at least 1, got 0"),
        ({"shared_expert": 1}, TypeError, "shared_expert must be True or False, got 1"),
        ({"reinit_ratio": 1.5}, ValueError, "reinit_ratio must be between 0 and 1, got 1.5"),
        ({"score_function": "relu"}, ValueError, "score_function must be one of softmax, sigmoid, got 'relu'"),
        ({"selection_bias": None}, ValueError, "selection_bias must be one of none, sign, z_score, got None"),
        ({"selection_bias_rate": 0}, ValueError, "selection_bias_rate must be positive, got 0"),
        (
            {"load_weight": 0.1, "router_noise": 1.0, "selection_bias": "sign"},
            ValueError,
            "load_weight > 0 cannot be combined with selection_bias='sign'",
        ),
        ({"blocks": np.array([1, 3])}, ValueError, 'blocks must be "every_other", "every" or a tuple of block indices'),
        ({"balance": np.zeros(2)}, ValueError, "balance must be one of top2, topk"),
        ({"z_weight": 10**400}, ValueError, "z_weight must be finite"),
        ({"blocks": (1, 2.0)}, ValueError, "blocks must be"),
        ({"load_weight": 0.1}, ValueError, "load_weight > 0 needs router_noise > 0"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        MoEConfig(**options)
