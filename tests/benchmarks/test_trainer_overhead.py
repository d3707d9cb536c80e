"""The benchmark of what the trainer costs beside its arithmetic."""

import csv

import pytest
import trainer_overhead

pytestmark = pytest.mark.usefixtures("threads_restored")


def test_a_row_for_each_model_and_source_of_data(make_pairs, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    short = ["--data", make_pairs(8), "--batch-size", "4", "--pairs", "1", "--steps-of-pair", "2", "--workers", "0"]

    assert trainer_overhead.main([*short, "--csv", str(path)]) == 0

    assert "data_share" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["model"]) for row in rows] == [
        (data, model) for data in ("in memory", "shards") for model in ("dense", "CLIP-UP")
    ]
    for row in rows:
        assert 0 < float(row["data_share"]) < 1 and float(row["bare_step_ms"]) > 0
        part = (1 - float(row["data_share"])) * float(row["batch_ms"]) / float(row["bare_step_ms"])
        assert part == pytest.approx(1 + float(row["overhead"]), rel=0.02)  # one pair: medians are its values
