"""The share of a GPU's peak in the record of a step."""

from __future__ import annotations

import pytest
import torch

import clipup
from clipup.clip.flops import count
from clipup.train import loop, train
from clipup.train.cards import pairs_per_second_at_peak


@pytest.mark.parametrize("name, tflops", [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None)])
def test_the_peak_is_three_forward_passes_per_pair_on_the_card_with_the_devices_name(
    make_model, monkeypatch, name, tflops
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    model = make_model(clipup.MoEConfig(num_experts=4))
    gflops = count(model).image_gflops + count(model).text_gflops
    expected = tflops and pytest.approx(4 * tflops * 1000 / (3 * gflops))

    assert pairs_per_second_at_peak(model, torch.device("cuda"), 4) == expected
    assert pairs_per_second_at_peak(model, torch.device("cpu"), 4) is None


def test_records_hold_mfu_where_the_peak_is_known(make_model, pairs, options, monkeypatch):
    monkeypatch.setattr(loop, "pairs_per_second_at_peak", lambda *_: 1000.0)
    for record in train(options(logs=None, steps=2), model=make_model(), loader=pairs()).history:
        assert record["mfu"] == pytest.approx(record["images_per_second"] / 1000)
