"""The share of a GPU's peak in the record of a step."""

from __future__ import annotations

import pytest
import torch

import clipup
from clipup.clip.flops import count
from clipup.train import cards, loop, train
from clipup.train.log.utilization import Utilization, peak_tflops


def test_mfu_is_three_forward_passes_per_pair_over_the_peak_of_all_ranks(make_model):
    model = make_model(clipup.MoEConfig(num_experts=4))
    counts = count(model)
    gflops = counts.image_gflops + counts.text_gflops

    assert Utilization(model, 4, 2.0).of(1000.0)["mfu"] == pytest.approx(1000 * 3 * gflops / (4 * 2000))
    assert Utilization(model, 4, None).of(1000.0) == {}


def test_the_peak_is_that_of_the_card_that_has_the_devices_name(monkeypatch):
    assert peak_tflops(torch.device("cpu")) is None
    for name, peak in {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda")) == peak
    names = [card.device_name for card in cards.CARDS.values()]
    assert all(names) and len(set(names)) == len(names)


def test_records_hold_it_where_the_peak_is_known(make_model, pairs, options, monkeypatch):
    monkeypatch.setattr(loop, "peak_tflops", lambda device: 0.5)
    model = make_model()
    expected = Utilization(model, 1, 0.5)
    for record in train(options(logs=None), model=model, loader=pairs()).history:
        assert record["mfu"] == expected.of(record["images_per_second"])["mfu"] > 0
