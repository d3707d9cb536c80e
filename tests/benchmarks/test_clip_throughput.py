"""The benchmark of whole models, on tiny ones, and its chart."""

import csv
import xml.etree.ElementTree as ET

import clip_throughput
import plot_throughput
import pytest
import torch

TINY = "clipup-tiny-32"
MODELS = (TINY, f"{TINY} CLIP-UP", f"{TINY} CLIP-UP accelerated")
ARGUMENTS = ["--models", *MODELS, "--batch-size", "4", "--words", "3", "--threads", "1", "--seconds", "0.05"]


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(clip_throughput, "BASELINE", TINY)
    monkeypatch.setattr(clip_throughput, "LARGE", TINY)
    monkeypatch.setattr(clip_throughput, "MODELS", MODELS)
    monkeypatch.setattr(plot_throughput, "BASELINE", TINY)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rows(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = ["--pass", "fwd", "fwd_bwd", "--dtype", "fp32", "--rounds", "2", "--csv", str(path)]
    assert clip_throughput.main([*ARGUMENTS, *arguments]) == 0
    assert "pairs_per_s" in capsys.readouterr().out
    with path.open() as file:
        return path, list(csv.DictReader(file))


def test_every_model_has_a_row_and_a_training_step_leaves_out_what_cannot_be_trained(rows):
    found = [(row["pass"], row["model"]) for row in rows[1]]
    assert found == [("fwd", name) for name in MODELS] + [("fwd_bwd", name) for name in MODELS[:2]]


def test_rates_come_from_the_measured_times_and_the_counted_flops(rows):
    for row in rows[1]:
        assert float(row["pairs_per_s"]) == pytest.approx(4e3 / float(row["median_ms"]), rel=0.05)
        assert float(row["speed_to_l14"]) == pytest.approx(float(row["speed_to_b16"]), abs=2e-3)
        if row["pass"] == "fwd":
            seconds = 1 / float(row["images_per_s"]) + 1 / float(row["texts_per_s"])
            assert 0.1 < seconds * float(row["pairs_per_s"]) < 10  # medians of different calls
        else:
            assert row["images_per_s"] == row["texts_per_s"] == ""
    forward, sparse, _, step, _ = (float(row["gflops_per_pair"]) for row in rows[1])
    assert step == pytest.approx(3 * forward, rel=1e-3) and sparse >= forward


def test_a_model_without_enough_memory_is_left_out_by_name(monkeypatch, tmp_path, capsys):
    build = clip_throughput.build

    def without_memory(name, *which):
        if name == MODELS[1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.26 GiB.\nand advice")
        return build(name, *which)

    monkeypatch.setattr(clip_throughput, "build", without_memory)
    path = tmp_path / "rows.csv"
    assert clip_throughput.main([*ARGUMENTS, "--rounds", "2", "--csv", str(path)]) == 0
    with path.open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == [MODELS[0], MODELS[2]]
    told = f"left out: {MODELS[1]} in bf16, fwd: CUDA out of memory. Tried to allocate 2.26 GiB.\n"
    assert told in capsys.readouterr().err


def test_the_chart_is_xml_with_a_mark_for_every_row(rows, tmp_path):
    out = tmp_path / "chart.svg"
    path, found = rows
    assert plot_throughput.main([str(path), "--out", str(out)]) == 0
    chart = ET.parse(out).getroot()
    marks = [e.get("id") for e in chart.iter() if e.get("id", "").endswith(MODELS)]
    assert len(marks) == len(set(marks)) == len(found)
    words = [e.text for e in chart.iter() if e.tag.endswith("}text")]
    assert words.count(f"{TINY} 1.00") == 2  # in both passes


def test_values_that_are_not_finite_are_not_timed(monkeypatch):
    monkeypatch.setattr(clip_throughput.Inference, "check", lambda self: False)
    with pytest.raises(SystemExit, match="not finite; nothing was timed"):
        clip_throughput.main(ARGUMENTS)
