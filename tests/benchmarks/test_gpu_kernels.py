"""The table of launches: every launch of both passes once, with the FLOPs and bytes of the layer and a prediction."""

import gpu_kernels
import gpu_model
import pytest
import torch
from gpu_kernels import Launch, ceilings, launches, measure, predictions

pytestmark = pytest.mark.interpreter
LAYER = (24, 16, 32, 2, 2)


def test_every_launch_of_both_passes_is_there_and_runs(monkeypatch):
    table = {launch.name: launch for launch in launches(*LAYER, torch.float16, "cpu")}
    assert list(table) == [
        "router_logits", "topk_gating", "dispatch", "project_in", "project_in, z kept", "project_rows", "combine",
        "project_back", "gate_gradient", "expert_gradients", "project_rows, dx", "gather_sum", "topk_gating_backward",
        "router_logits_backward", "sum of x's gradients", "torch, in", "torch, out",
    ]  # fmt: skip
    for launch in table.values():
        launch.run()
    product = 2 * 48 * 16 * 32
    assert [table[name].flops / product for name in table] == [0, 0, 0, 1, 1, 1, 0, 1, 0, 2, 1, 0, 0, 0, 0, 1, 1]
    assert all(launch.bytes > 0 for launch in table.values())


def test_launches_and_predictions_have_the_same_names_and_bytes(monkeypatch):
    monkeypatch.setattr(gpu_model, "predict", lambda product, l2, tile: gpu_model.Prediction(*[product.dram_bytes] * 7))
    predicted = predictions(*LAYER, 7.5e12)
    table = {launch.name: launch for launch in launches(*LAYER, torch.float16, "cpu") if "torch" not in launch.name}
    assert set(predicted) == set(table)
    for name, launch in table.items():
        if launch.flops:
            assert launch.bytes == predicted[name], name


def test_ceilings_read_and_copy_what_they_say():
    copy, read, product = ceilings("cpu", torch.float16, size=16, copied=1 << 16)
    assert torch.equal(copy.run(), torch.ones(1 << 14)) and copy.bytes == 1 << 17
    assert read.bytes == 4 * 4096 * 2 * gpu_kernels.PASSES
    read.run()
    assert product.run().shape == (16, 16) and product.flops == 2 * 16**3


def test_a_row_has_the_median_and_the_rates(monkeypatch):
    times = iter([5e-3, 1e-3, 3e-3, 2e-3, 4e-3])
    monkeypatch.setattr(gpu_kernels, "clock", lambda run, device: next(times))
    row = measure(Launch("a", 6e9, 9e6, lambda: None), "cpu", 5)
    assert (row["ms"], row["p20_ms"], row["p80_ms"]) == ("3.0000", "2.0000", "4.0000")
    assert (row["tflops"], row["gbytes_per_s"]) == ("2", "3")
