"""The benchmark of a training step on the study's model."""

import csv

import pytest
import training_step

pytestmark = pytest.mark.usefixtures("threads_restored")


SHORT = ["--batch-size", "8", "--seconds", "0.05", "--rounds", "2"]


def test_a_run_writes_seconds_beside_flops_of_all_models(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert training_step.main([*SHORT, "--csv", str(path)]) == 0
    assert "seconds_ratio" in capsys.readouterr().out
    with path.open() as file:
        unpadded, dense, sparse = csv.DictReader(file)
    assert (unpadded["impl"], dense["impl"], sparse["impl"]) == ("dense_unpadded", "dense", "clip_up")
    assert unpadded["seconds_ratio"] == unpadded["flops_ratio"] == dense["flops_ratio"] == "1.000"
    assert float(sparse["flops_ratio"]) == pytest.approx(1.315, abs=1e-3) and float(sparse["seconds_ratio"]) > 0


def test_the_batch_can_be_real_pairs_of_which_the_rows_name_no_directory(make_pairs, tmp_path):
    path = tmp_path / "rows.csv"

    assert training_step.main([*SHORT, "--data", make_pairs(8), "--csv", str(path)]) == 0
    with path.open() as file:
        assert {row["data"] for row in csv.DictReader(file)} == {"pairs.csv"}
    with pytest.raises(SystemExit, match="has 7 pairs, fewer than --batch-size 8"):
        training_step.main([*SHORT, "--data", make_pairs(7)])
