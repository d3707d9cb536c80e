"""What a run leaves as it is: numbers measured on other data, checkpoints on a disk that is away, another run's copy,
and a run that has ended."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clipup.train import train
from clipup.train.checkpoints import open_clip_format


@pytest.fixture
def validated(make_model, pairs, options, csv_data):
    def validated(**changes):
        return train(
            options(**{"steps": None, "epochs": 2, "val_data": csv_data, **changes}),
            model=make_model(),
            preprocess=open_clip.image_transform(16, is_train=False),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
            loader=pairs(),
        )

    return validated


@pytest.mark.parametrize("name", ["run", "other"])
def test_numbers_of_other_data_are_not_taken_for_its_own(validated, csv_data, tmp_path, name):
    once = validated()
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(Path(csv_data).read_text().splitlines(keepends=True)[:9]))
    state = open_clip_format.load(once.directory / "checkpoints" / "epoch_latest.pt")
    torch.save({**state, "finished": False}, once.directory / "checkpoints" / "epoch_latest.pt")
    resume = "latest" if name == "run" else str(once.directory / "checkpoints" / "epoch_latest.pt")

    other = validated(name=name, resume=resume, val_data=str(fewer))

    last = json.loads((other.directory / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["gallery"] == 8


def test_a_run_does_not_begin_where_the_copy_is_of_another_one(run, tmp_path):
    copied = {"remote_sync": f"file://{tmp_path}/there", "remote_sync_protocol": "fsspec"}
    directory = run(**copied).directory
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    with pytest.raises(FileExistsError, match="there/run holds the copy of a run, .*delete the copy"):
        run(force=True, **copied)
    directory.rename(tmp_path / "lost")
    with pytest.raises(FileExistsError, match="there/run holds the copy of a run, .*Copy it back"):
        run(resume="latest", **copied)
    (tmp_path / "lost").rename(directory)

    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert run(resume="latest", epochs=4, **copied).steps == 12
