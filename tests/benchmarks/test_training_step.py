"""The benchmark of a training step on the study's model."""

import csv

import pytest
import torch
import training_step


@pytest.fixture(autouse=True)
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_writes_seconds_beside_flops_of_both_models(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert training_step.main(["--batch-size", "8", "--seconds", "0.05", "--rounds", "2", "--csv", str(path)]) == 0
    assert "seconds_ratio" in capsys.readouterr().out
    with path.open() as file:
        dense, sparse = csv.DictReader(file)
    assert (dense["impl"], sparse["impl"]) == ("dense", "clip_up")
    assert dense["seconds_ratio"] == dense["flops_ratio"] == "1.000"
    assert float(sparse["flops_ratio"]) == pytest.approx(1.315, abs=1e-3) and float(sparse["seconds_ratio"]) > 0
