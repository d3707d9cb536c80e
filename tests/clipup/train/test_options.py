"""The values that options take, and what is said of others."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from clipup.train import TrainOptions


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"force_image_size": np.array([16, 32])}, {"force_image_size": (16, 32)}),
        ({"force_image_size": [16, 32]}, {"force_image_size": (16, 32)}),
        ({"force_image_size": np.int64(16)}, {"force_image_size": 16}),
        ({"image_mean": np.float32(0.5)}, {"image_mean": (0.5,)}),
        ({"image_std": np.array(1.0)}, {"image_std": (1.0,)}),
        ({"image_std": [1, 2, 3]}, {"image_std": (1, 2, 3)}),
        ({"lr": np.float32(0.25)}, {"lr": 0.25}),
        ({"wd_exclude": ["*bias"]}, {"wd_exclude": ("*bias",)}),
        ({"train_data": Path("a") / "b.csv", "logs": Path("x")}, {"train_data": "a/b.csv", "logs": "x"}),
        ({"opt_kwargs": {"max_grad_norm": math.inf}}, {"opt_kwargs": {"max_grad_norm": math.inf}}),
        (
            {"opt_kwargs": {"a": [None, True, (1, "b", {"c": 0.5})]}},
            {"opt_kwargs": {"a": [None, True, (1, "b", {"c": 0.5})]}},
        ),
    ],
)
def test_numbers_of_numpy_lists_and_paths_are_taken(given, kept):
    options = TrainOptions(**given)
    assert {name: getattr(options, name) for name in kept} == kept
    assert all(type(getattr(options, name)) is type(value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [1e-3]}, r"lr must be a number, got \[0.001\]"),
        ({"wd_exclude": "*weight"}, r"wd_exclude must be a tuple of strings, got '\*weight'"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"steps": 10.5}, r"steps must be a whole number or None, got 10\.5"),
        ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
        ({"opt": None}, "opt must be a string, got None"),
        ({"report_to": None}, "report_to must be a string, got None"),
        ({"name": 5}, "name must be a string or None, got 5"),
        ({"lock_image": "no"}, "lock_image must be True or False, got 'no'"),
        ({"data_retries": math.inf}, "data_retries must be a whole number, got inf"),
        ({"max_image_pixels": math.nan}, "max_image_pixels must be a whole number, got nan"),
        ({"force_image_size": (1, 2, 3)}, r"force_image_size must be a whole number or a tuple of 2 whole numbers or"),
        ({"aug_cfg": "scale"}, "aug_cfg must be a dict, got 'scale'"),
        ({"moe_cfg": {}}, r"moe_cfg must be a MoEConfig, got \{\}"),
        ({"opt_kwargs": {"lr": torch.tensor(1e-3)}}, r"opt_kwargs\['lr'\] must be a value of JSON.*, got tensor"),
        ({"opt_kwargs": {"betas": (0.9, {0.99})}}, r"opt_kwargs\['betas'\] must be a value of JSON.*, got \(0.9"),
        ({"aug_cfg": {"scale": 1 + 2j}}, r"aug_cfg\['scale'\] must be a value of JSON.*, got \(1\+2j\)"),
        ({"opt_kwargs": {1: 2}}, "a key of opt_kwargs must be a string, got 1"),
    ],
)
def test_values_of_other_types_are_refused_by_name(changes, message):
    with pytest.raises(TypeError, match=message):
        TrainOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler": "x"}, "lr_scheduler must be one of cosine, const, const-cooldown, got 'x'"),
        ({"dataset_type": "parquet"}, "dataset_type must be one of webdataset, csv, auto, got 'parquet'"),
        ({"name": ".."}, r"name must be the name of a directory, without separators, got '\.\.'"),
        ({"name": "."}, "name must be the name of a directory"),
        ({"name": "a\0"}, "name must be the name of a directory"),
    ],
)
def test_choices_that_there_are_not_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


NUMBERS = ["lr", "eps", "wd", "lr_cooldown_end", "lr_cooldown_power", "grad_clip_norm", "beta1"]


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**400, 10**39, -1e300], ids=lambda value: f"{str(value)[:5]}")
@pytest.mark.parametrize("name", [*NUMBERS, "coca_caption_loss_weight"])
def test_numbers_are_finite_in_float32(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be finite in float32, got {value}"[:100])):
        TrainOptions(**{name: value})


@pytest.mark.parametrize("name", ["warmup", "epochs", "max_nonfinite_steps"])
def test_whole_numbers_that_are_divided_are_no_larger_than_a_float(name):
    with pytest.raises(ValueError, match=f"{name} must be finite in float32, got 10000"):
        TrainOptions(**{name: 10**400})


@pytest.mark.parametrize(
    "changes",
    [
        {"image_std": (math.inf,)},
        {"image_mean": (math.nan, 0.0, 0.0)},
        {"aug_cfg": {"scale": (math.nan, 1.0)}},
        {"opt_kwargs": {"eps": math.inf}},
        {"opt_kwargs": {"weight_decay": math.inf}},
        {"opt_kwargs": {"max_grad_norm": math.nan}},
        {"opt_kwargs": {"max_grad_norm": 10**400}},
        {"image_std": (10**400,)},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_numbers_within_others_are_finite(changes):
    with pytest.raises(ValueError, match=rf"{next(iter(changes))}.* must be finite( in float32)?, got "):
        TrainOptions(**changes)
