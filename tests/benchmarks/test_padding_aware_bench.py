"""The benchmark of padding-aware routing on the tiny model."""

import csv

import padding_aware
import pytest
import torch

pytestmark = pytest.mark.usefixtures("threads_restored")

ARGUMENTS = ["--models", "clipup-tiny-32", "--batch-size", "4", "--threads", "1", "--seconds", "0.05", "--rounds", "2"]


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a red heart\n\nwaving hand, hello\n")
    return str(path)


def test_a_run_prints_a_table_and_writes_a_row_for_each_way(tmp_path, captions, capsys):
    path = tmp_path / "rows.csv"
    assert padding_aware.main([*ARGUMENTS, "--captions", captions, "--csv", str(path)]) == 0
    assert "ratio_to_all_tokens" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    ways = ["dense", "all_tokens", "padding_aware"]
    assert [(row["dtype"], row["impl"]) for row in rows] == [(dtype, way) for dtype in ("fp32", "bf16") for way in ways]
    for row in rows:
        assert float(row["median_ms"]) > 0 and row["context_length"] == "12"
        assert (float(row["tokens"]) < 1) == (row["impl"] == "padding_aware")
        assert row["ratio_to_all_tokens"] == "1.000" or row["impl"] != "all_tokens"


def test_features_that_differ_are_not_timed(monkeypatch, captions):
    monkeypatch.setattr(
        padding_aware, "encoder", lambda model, texts, padding_aware: lambda: torch.ones(1) * padding_aware
    )
    with pytest.raises(SystemExit, match="features differ by 1.0e\\+00; nothing was timed"):
        padding_aware.main([*ARGUMENTS, "--captions", captions])
