"""A run continues within an epoch on another number of ranks: the same samples, and the losses of one process."""

import json

import pytest
from elastic_run import run, write_csv
from picture_samples import png
from rank_processes import on_ranks

from clipup.train.checkpoints.format import load


def losses(folder, name):
    lines = (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["contrastive"] for line in lines]


def samples(folder, name, world_size, accum_freq=1):
    """Those of every step, from all ranks in order; an accumulated batch has two forward passes."""
    of_ranks = []
    for rank in range(world_size):
        path = folder / f"{name}-rank_{rank}.txt"
        batches = [line.split() for line in path.read_text().splitlines()]
        path.unlink()
        passes = 2 * accum_freq if accum_freq > 1 else 1
        starts = range(0, len(batches), passes)
        of_ranks.append([sum(batches[start : start + accum_freq], []) for start in starts])
    return [sum(step, []) for step in zip(*of_ranks, strict=True)]


DIVIDED = {"batch_size": 4, "accum_freq": 2}
"""Two batches by one process are one each on two ranks: noise and dropping are the same too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "whole", "parts"),
    [
        ("sparse", {}, [(2, 2, {}), (4, 9, {}), (1, 12, {})]),
        ("noisy", DIVIDED, [(1, 3, DIVIDED), (2, 12, {"batch_size": 4})]),
    ],
)
def test_a_run_continued_on_other_numbers_of_ranks_equals_one_process(tmp_path, kind, whole, parts):
    """Six steps an epoch; changes after step 2 of the first and after step 3 of the second."""
    write_csv(tmp_path, 50, png)
    (tmp_path / "7.png").write_bytes(b"no picture")
    run(tmp_path, "whole", kind, 12, whole)
    expected = samples(tmp_path, "whole", 1, whole.get("accum_freq", 1))
    assert len(expected) == 12 and sorted(map(len, expected)) == [8] * 12

    seen = []
    for world_size, steps, changes in parts:
        arguments = "elastic", kind, steps, {"resume": "latest", **changes}
        if world_size == 1:
            run(tmp_path, *arguments)
        else:
            on_ranks(tmp_path, world_size, run, tmp_path, *arguments)
        seen += samples(tmp_path, "elastic", world_size, changes.get("accum_freq", 1))

    assert seen == expected
    assert losses(tmp_path, "elastic") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)
    state = load(tmp_path / "logs" / "elastic" / "checkpoints" / "epoch_latest.pt")
    assert (state["epoch"], state["samples_seen"], list(state["skipped_samples"].values())) == (2, 96, [1])
