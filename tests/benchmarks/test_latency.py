"""The benchmark of single requests, on tiny models."""

import csv

import latency
import peers
import pytest
import torch

TINY = "clipup-tiny-32"
MODELS = (TINY, f"{TINY} int8", f"{TINY} CLIP-UP", f"{TINY} CLIP-UP accelerated", f"{TINY} onnxruntime")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(latency, "BASELINE", TINY)
    monkeypatch.setattr(latency, "MODELS", MODELS)
    yield
    torch.set_num_threads(threads)


def test_every_model_has_a_row_for_an_image_and_a_caption(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "missing", lambda packages: ["onnxruntime"])
    path = tmp_path / "rows.csv"
    arguments = ["--models", *MODELS, "--dtype", "fp32", "--threads", "1", "--rounds", "10", "--csv", str(path)]
    assert latency.main(arguments) == 0
    printed = capsys.readouterr()
    assert "p99_ms" in printed.out and "left out onnxruntime: pip install onnxruntime" in printed.err
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["input"], row["model"]) for row in rows[:8]] == [
        (what, name) for what in ("image", "caption") for name in MODELS[:4]
    ]
    assert {row["model"] for row in rows if row["input"] == "token"} >= {"dense MLP", "SparseMoE int8"}
    for row in rows:
        assert 0 < float(row["p50_ms"]) <= float(row["p99_ms"])
    assert rows[0]["ratio_to_first"] == "1.000"


def test_calls_take_turns():
    order = []
    taken = latency.in_turn({name: lambda n=name: order.append(n) for name in "ab"}, rounds=3)
    assert order == ["a", "b"] * 5 and {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_onnxruntime_computes_the_models_features():
    for name in peers.ONNX_PACKAGES:
        pytest.importorskip(name)
    texts = latency.get_tokenizer(TINY)(["red bird"])
    model, image = latency.model_of(f"{TINY} onnxruntime", latency.argparse.Namespace(dtype="fp32", threads=1), texts)
    assert model.encode_image(image).shape == model.encode_text(texts).shape
