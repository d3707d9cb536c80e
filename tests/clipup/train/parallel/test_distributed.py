"""Two ranks skip, resume, finish and refuse alike."""

import json

import faulty_run
import pytest
from rank_processes import on_ranks

from clipup.train.checkpoints.format import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("resumed")
    on_ranks(out, 2, faulty_run.resumed, out)
    return out


def test_ranks_skip_resume_finish_and_refuse_alike(out):
    seen = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert [found["skipped"] for found in seen] == [[0, 1, 1], []]  # rank 0 alone has records
    assert seen[0]["statistics"] == seen[1]["statistics"]
    for found in seen:
        assert found["finite"] and found["idle"] and found["same"]
        assert "is nan at step 2" in found["stopped"] and "epoch_latest.pt, are finite" in found["stopped"]


def test_another_number_of_ranks_is_refused_within_an_epoch_and_accepted_at_its_end(out):
    with pytest.raises(ValueError, match=r"within epoch 3, after step 1 of 2; with world_size 2 -> 1 the rest"):
        faulty_run.run(out, name="run", steps=8, resume="latest")
    start = str(out / "run" / "checkpoints" / "epoch_2.pt")
    other = faulty_run.run(out, name="other", steps=8, resume=start)

    assert load(other.directory / "checkpoints" / "epoch_latest.pt")["samples_seen"] == 4 * 8 + 4 * 4
