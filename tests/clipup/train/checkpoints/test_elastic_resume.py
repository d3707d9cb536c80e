"""A run on indexed data is resumed within an epoch under another division of the same global batch."""

from functools import partial

import pytest

import clipup
from clipup.train.checkpoints.format import load


@pytest.fixture(params=["shards", pytest.param("csv", marks=pytest.mark.slow)])
def run(request, run, csv_data, shards):
    """Epochs of three steps of eight of the 24 samples, with random crops; a sparse model that drops nothing."""
    data = {"train_data": csv_data if request.param == "csv" else shards, "batch_size": 8, "workers": 0}
    return partial(run, sparse=clipup.MoEConfig(num_experts=4), eps=1e-3, lr_scheduler="const", warmup=0, **data)


def contrastive(result):
    return [record["contrastive"] for record in result.history]


@pytest.mark.parametrize("changes", [{"batch_size": 4, "accum_freq": 2}, {"workers": 2}])
def test_the_same_global_batch_continues_within_an_epoch(run, changes):
    whole = contrastive(run(name="whole", steps=6))
    run(steps=4)

    resumed = run(steps=6, resume="latest", **changes)

    assert contrastive(resumed) == pytest.approx(whole, rel=1e-4)
    assert load(resumed.directory / "checkpoints" / "epoch_latest.pt")["samples_seen"] == 48


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"accum_freq": 2}, "accum_freq 1 -> 2"),
        ({"train_num_samples": 16}, "train_num_samples None -> 16"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"cache_data": True}, "cache_data False -> True"),
        ({"max_image_pixels": 255}, "max_image_pixels 89478485 -> 255"),
        ({"workers": 2}, "workers 0 -> 2"),
    ],
)
def test_another_sequence_is_refused_within_an_epoch_by_name(run, shards, changes, cause):
    if "workers" in changes:  # they decide the sequence of streamed data
        run = partial(run, train_data=f"file:{shards}", train_num_samples=24)
    run(steps=4)

    with pytest.raises(
        ValueError, match=f"within epoch 2, after step 1 of 3; with {cause} the rest of the epoch would"
    ):
        run(steps=6, resume="latest", resume_with_changes=True, **changes)


def test_data_that_have_changed_are_refused_within_an_epoch(run, tmp_path):
    run(steps=4)
    (tmp_path / "3.png").unlink()
    (tmp_path / "train-0.tar").write_bytes((tmp_path / "train-1.tar").read_bytes())

    with pytest.raises(ValueError, match="with other training data"):
        run(steps=6, resume="latest")
