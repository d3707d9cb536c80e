"""A run continues within an epoch on another number of ranks: the same samples, and the losses of one process."""

from __future__ import annotations

import json

import pytest
from elastic_run import run, write_csv
from picture_samples import png
from rank_processes import on_ranks

from clipup.train.checkpoints.open_clip_format import load


def losses(folder, name):
    lines = (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["contrastive"] for line in lines]


def samples(folder, name, world_size, accum_freq=1):
    """Those of every step, from all ranks in order."""
    of_ranks = []
    for rank in range(world_size):
        path = folder / f"{name}-rank_{rank}.txt"
        batches = [line.split() for line in path.read_text().splitlines()]
        path.unlink()
        if accum_freq > 1:  # two forward passes of every batch
            batches = [
                batch
                for start in range(0, len(batches), 2 * accum_freq)
                for batch in batches[start : start + accum_freq]
            ]
        of_ranks.append([sum(batches[i : i + accum_freq], []) for i in range(0, len(batches), accum_freq)])
    return [sum(step, []) for step in zip(*of_ranks, strict=True)]


@pytest.mark.slow
def test_two_ranks_then_four_then_one_equal_one_process(tmp_path):
    """Six steps an epoch; changes after step 2 of the first and after step 3 of the second."""
    write_csv(tmp_path, 50, png)
    (tmp_path / "7.png").write_bytes(b"no picture")
    run(tmp_path, "whole", "sparse", 12)
    expected = samples(tmp_path, "whole", 1)
    assert len(expected) == 12 and sorted(map(len, expected)) == [8] * 12

    seen = []
    for world_size, steps in ((2, 2), (4, 9), (1, 12)):
        arguments = "elastic", "sparse", steps, {"resume": "latest"}
        if world_size == 1:
            run(tmp_path, *arguments)
        else:
            on_ranks(tmp_path, world_size, run, tmp_path, *arguments)
        seen += samples(tmp_path, "elastic", world_size)

    assert seen == expected
    assert losses(tmp_path, "elastic") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)
    state = load(tmp_path / "logs" / "elastic" / "checkpoints" / "epoch_latest.pt")
    assert (state["epoch"], state["samples_seen"], list(state["skipped_samples"]["all"].values())) == (2, 96, [1])


@pytest.mark.slow
def test_with_batches_of_the_same_size_noise_and_dropping_are_the_same_too(tmp_path):
    """Batches of four: two accumulated by one process, or one each on two ranks."""
    write_csv(tmp_path, 50, png)
    divided = {"batch_size": 4, "accum_freq": 2}
    run(tmp_path, "whole", "noisy", 8, divided)
    run(tmp_path, "elastic", "noisy", 3, divided)
    (tmp_path / "elastic-rank_0.txt").unlink()

    on_ranks(tmp_path, 2, run, tmp_path, "elastic", "noisy", 8, {"batch_size": 4, "resume": "latest"})

    assert samples(tmp_path, "elastic", 2) == samples(tmp_path, "whole", 1, accum_freq=2)[3:]
    assert losses(tmp_path, "elastic") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)
