import json
import warnings

import numpy as np
import pytest

from clipup import MoEConfig
from clipup.moe.config import LOSS_WEIGHTS


def test_clip_up_preset_is_the_recipe():
    config = MoEConfig.clip_up()
    assert (config.num_experts, config.top_k, config.capacity_factor, config.eval_capacity_factor) == (8, 2, 1.0, None)
    assert (config.balance_weight, config.z_weight, config.balance) == (0.01, 1e-4, "top2")
    assert (config.towers, config.blocks, config.normalize_gates) == (None, "every_other", "before_drop")


def test_a_single_normalized_gate_gives_a_warning_that_the_router_does_not_learn():
    with pytest.warns(UserWarning, match="top_k=1.*normalize_gates"):
        MoEConfig.clip_up(top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for learns in ({"normalize_gates": "none"}, {"num_experts": 1}, {"routing": "expert_choice"}):
            MoEConfig(top_k=1, **learns)


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
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({}, True),
        ({"granularity": 2, "shared_expert": True, "score_function": "sigmoid", "selection_bias": "sign"}, True),
        ({"normalize_gates": "after_drop"}, True),
        ({"normalize_gates": "none"}, False),
        ({"reinit_ratio": 0.1}, False),
        ({"routing": "expert_choice"}, False),
    ],
)
def test_config_says_whether_the_upcycled_model_computes_the_dense_function(options, keeps):
    assert MoEConfig(**options).keeps_function is keeps


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_every_weight_of_a_loss_is_checked_and_counts_as_a_loss(name):
    assert not MoEConfig(router_noise=1.0).has_losses
    assert MoEConfig(router_noise=1.0, **{name: 0.5}).has_losses
    with pytest.raises(ValueError, match=name):
        MoEConfig(router_noise=1.0, **{name: -1})


def test_threshold_of_global_entropy_defaults_to_the_uniform_distribution():
    assert MoEConfig(num_experts=8).global_entropy_threshold == pytest.approx(2.0794415)
    assert MoEConfig(entropy_threshold=1.0).global_entropy_threshold == 1.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": 9}, ValueError),
        ({"num_experts": 0}, ValueError),
        ({"capacity_factor": 0}, ValueError),
        ({"eval_capacity_factor": "2"}, TypeError),
        ({"router_noise": -0.1}, ValueError),
        ({"z_weight": float("inf")}, ValueError),
        ({"normalize_gates": "after"}, ValueError),
        ({"priority": 1}, TypeError),
        ({"towers": ()}, ValueError),
        ({"towers": ("vision",)}, ValueError),
        ({"towers": ("text", "text")}, ValueError),
        ({"blocks": "all"}, ValueError),
        ({"blocks": (1, 2.0)}, ValueError),
        ({"blocks": np.array([1, 3])}, ValueError),
        ({"last_blocks": 0}, ValueError),
        ({"last_blocks": 1, "blocks": (1, 2)}, ValueError),
        ({"granularity": 3}, ValueError),
        ({"top_k": 3, "granularity": 2}, ValueError),
        ({"reinit_ratio": 1.5}, ValueError),
        ({"entropy_threshold": -1}, ValueError),
        ({"selection_bias_rate": 0}, ValueError),
        ({"load_weight": 0.1}, ValueError),
        ({"load_weight": 0.1, "router_noise": 1.0, "selection_bias": "sign"}, ValueError),
        ({"importance_weight": 0.1, "loss_scope": "global_batch"}, ValueError),
        *(
            ({name: value, "routing": "expert_choice"}, ValueError)
            for name, value in {
                "selection_bias": "sign",
                "priority": True,
                "granularity": 2,
                "loss_scope": "global_batch",
                "towers": ("decoder",),
            }.items()
        ),
        ({"expert_count": 4}, TypeError),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, error):
    with pytest.raises(error, match=next(iter(options))):
        MoEConfig.from_dict(options)
