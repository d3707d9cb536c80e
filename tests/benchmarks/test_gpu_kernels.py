"""The table of launches: every launch of both passes once, with the FLOPs and bytes of the layer and a prediction."""

import sys
import types

import gpu_kernels
import gpu_model
import pytest
import torch
from gpu_kernels import Launch, ceilings, launches, predictions

pytestmark = pytest.mark.interpreter
LAYER = (24, 16, 32, 2, 2)
PEERS = ("loop, in", "grouped_mm and bias, in", "loop, out", "grouped_mm and bias, out")
QUACK = ("quack, in", "quack, in with GELU", "quack, out", "quack, in's gradient")


def quack_gemm(left, right, bias=None, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None):  # noqa: N803
    """What QuACK documents of ``gemm``: left [M, K], right [L, K, N]; or left [M, R], right [R, N], summed by parts."""
    if cu_seqlens_k is not None:
        counts = cu_seqlens_k.diff().tolist()
        parts = zip(left.split(counts, 1), right.split(counts), strict=True)
        return torch.stack([own.float() @ other.float() for own, other in parts])
    left = left if A_idx is None else left[A_idx]
    parts = zip(left.split(cu_seqlens_m.diff().tolist()), right, bias, strict=True)
    return torch.cat([own.float() @ weight.float() + added.float() for own, weight, added in parts])


def quack_gemm_act(left, right, activation, store_preact, **options):
    assert activation == "gelu_tanh_approx" and not store_preact
    return None, torch.nn.functional.gelu(quack_gemm(left, right, **options), approximate="tanh")


def test_a_peer_that_fails_or_differs_is_left_out_by_name(capsys):
    def fails():
        raise TypeError("gemm() got an unexpected keyword argument")

    right = torch.ones(3, 3)
    assert gpu_kernels.agrees("exact", lambda: right, lambda: right)
    assert not gpu_kernels.agrees("wrong, in", lambda: 1.1 * right, lambda: right)
    assert not gpu_kernels.agrees("not finite, in", lambda: right / 0 * 0, lambda: right)
    assert not gpu_kernels.agrees("quack, in", fails, lambda: right)
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[:2] for line in told] == [
        ["left out", " wrong, in"], ["left out", " not finite, in"], ["left out", " quack, in"],
    ]  # fmt: skip
    assert told[2].endswith("TypeError: gemm() got an unexpected keyword argument")


def test_every_launch_of_both_passes_is_there_and_runs(monkeypatch):
    quack = types.ModuleType("quack.gemm_interface")
    quack.gemm, quack.gemm_act = quack_gemm, quack_gemm_act
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", quack)
    table = {launch.name: launch for launch in launches(*LAYER, torch.float16, "cpu", with_peers=True)}
    assert list(table) == [
        "router_logits", "topk_gating", "dispatch", "project_in", "project_in, z kept", "project_rows", "combine",
        "project_back", "gate_gradient", "expert_gradients", "project_rows, dx", "gather_sum", "topk_gating_backward",
        "router_logits_backward", "sum of x's gradients", "torch, in", "torch, out", *PEERS, *QUACK,
    ]  # fmt: skip
    for launch in table.values():
        launch.run()
    product = 2 * 48 * 16 * 32
    assert [table[name].flops / product for name in table] == [0, 0, 0, 1, 1, 1, 0, 1, 0, 2, 1, 0, 0, 0, 0] + [1] * 10
    assert all(launch.bytes > 0 for launch in table.values())


def test_launches_and_predictions_have_the_same_names_and_bytes(monkeypatch):
    monkeypatch.setattr(gpu_model, "predict", lambda product, l2, tile: gpu_model.Prediction(*[product.dram_bytes] * 6))
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


def test_a_launch_that_fails_is_named_and_what_is_measured_is_written_at_once(monkeypatch, capsys, tmp_path):
    def fails():
        raise RuntimeError("no such instruction\nwith a long log")

    written = tmp_path / "kernels.csv"

    def launches(*which):
        assert [line.split(",")[0] for line in written.read_text().splitlines()] == ["launch", "copy"]
        yield Launch("project_in", 1e9, 1e6, lambda: None)
        yield Launch("project_back", 1e9, 1e6, fails)
        yield Launch("gather_sum", 0, 1e6, lambda: None)

    card = types.SimpleNamespace(major=9, multi_processor_count=gpu_model.MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(gpu_kernels, "require_device", lambda device: None)
    monkeypatch.setattr(gpu_kernels, "processor_name", lambda device: "a card")
    monkeypatch.setattr(gpu_kernels, "clock", lambda run, device: run() or 1e-3)
    ceilings = [Launch("copy", 0, 1e9, lambda: None), Launch("L2 read", 0, 1e9, fails)]
    monkeypatch.setattr(gpu_kernels, "ceilings", lambda *which: ceilings)
    monkeypatch.setattr(gpu_kernels, "launches", launches)
    assert gpu_kernels.main(["--csv", str(written)]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert told == [
        "left out: L2 read: RuntimeError: no such instruction",
        "left out: predictions: StopIteration: ",
        "left out: project_back: RuntimeError: no such instruction",
    ]
    names = [line.split(",")[0] for line in written.read_text().splitlines()]
    assert names == ["launch", "copy", "project_in", "gather_sum"]
