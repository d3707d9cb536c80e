"""The values that options take, and which ones are refused by name."""

import math
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from clipup import MoEConfig
from clipup.option_group import Resumed
from clipup.train import TrainOptions
from clipup.train.train_options import GROUPS


def test_there_are_no_more_workers_than_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    assert TrainOptions().data.workers == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"force_image_size": np.array([16, 32])}, {"force_image_size": (16, 32)}),
        ({"force_image_size": np.int64(16)}, {"force_image_size": 16}),
        ({"image_std": [1, 2, 3]}, {"image_std": (1, 2, 3)}),
        ({"lr": np.float32(0.25)}, {"lr": 0.25}),
        ({"aug_cfg": {"scale": np.array([0.5, 1.0])}}, {"aug_cfg": {"scale": [0.5, 1.0]}}),
        ({"train_data": Path("a") / "b.csv", "logs": Path("x")}, {"train_data": "a/b.csv", "logs": "x"}),
        ({"precision": "amp_bfloat16"}, {"precision": "amp_bf16"}),
    ],
)
def test_numbers_of_numpy_lists_paths_and_second_names_are_taken(given, kept):
    options = TrainOptions.flat(**given)
    found = {name: getattr(group, name) for group in options.groups() for name in kept if hasattr(group, name)}
    assert found == kept and all(type(found[name]) is type(value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        *[
            (changes, TypeError)
            for changes in (
                *({"lr": [1e-3]}, {"wd_exclude": "*weight"}, {"batch_size": "8"}, {"steps": 10.5}, {"opt": None}),
                *({"lr_scheduler": "x"}, {"precision": "fp16"}, {"lock_image": "no"}, {"force_image_size": (1, 2, 3)}),
                *({"aug_cfg": "scale"}, {"moe_cfg": {}}, {"image_mean": (0.5, 0.5)}, {"image_std": ()}),
                *({"image_mean": ("a",)}, {"moe": MoEConfig(num_experts=4)}),
            )
        ],
        *[
            (changes, ValueError)
            for changes in (
                *({"name": ".."}, {"name": "a/b"}, {"lr": 0.0}, {"lr": math.nan}, {"wd": math.inf}, {"batch_size": 0}),
                *({"steps": 0}, {"warmup": -1}, {"grad_clip_norm": 0.0}, {"coca_caption_loss_weight": -1}),
                *({"report_to": "comet"}, {"resume": "latest"}, {"siglip": True, "multi_positive": True}),
                *({"resume_dense": "x.pt"}, {"resume_dense": "x.pt", "moe": True, "pretrained": "openai"}),
                *({"lr_scheduler": "const-cooldown"}, {"ep": 0}, {"dist_timeout": 0}, {"save_total_limit": 0}),
                *({"opt": "adam"}, {"max_skipped": 2.0}, {"workers": -1}, {"seed": -1}),
                *({"opt_kwargs": {"lr": 1.0}}, {"opt_kwargs": {"weight_decay": 0.1}}),
                *({"beta1": 0.9, "opt": "timm/lion"}, {"beta2": 0.9, "opt": "timm/lamb"}),
            )
        ],
    ],
    ids=str,
)
def test_values_of_other_types_out_of_range_or_that_do_not_go_together_are_refused_by_name(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        TrainOptions.flat(**changes)


def test_every_option_has_a_name_of_its_own_and_a_rule_for_resumed_runs():
    options = [each for group in GROUPS.values() for each in fields(group)]
    assert [name for name, count in Counter(each.name for each in options).items() if count > 1] == []
    assert [each.name for each in options if not isinstance(each.metadata["resumed"], Resumed)] == []


def test_a_name_that_is_no_option_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        TrainOptions.flat(learning_rate=1.0)


def test_changed_options_are_checked_and_leave_the_others_as_they_were():
    options = TrainOptions.flat(lr=0.5)
    assert options.changed(steps=3).values() == options.values() | {"steps": 3}
    assert options == TrainOptions.flat(lr=0.5)
    with pytest.raises(ValueError, match="steps"):
        options.changed(steps=0)
