"""An epoch is saved before it is validated, and a resumed run validates an epoch that the stopped one did not."""

from __future__ import annotations

import open_clip
import pytest
import torch

from clipup.train import Every, train
from clipup.train.checkpoints.open_clip_format import load
from clipup.train.loop import Trainer


@pytest.fixture
def run(make_model, pairs, options, csv_data):
    """Nine steps, three an epoch, validated after each."""

    def run(callbacks=(), **changes):
        return train(
            options(**{"steps": None, "epochs": 3, "val_data": csv_data, **changes}),
            model=make_model(),
            preprocess=open_clip.image_transform(16, is_train=False),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
            loader=pairs(),
            callbacks=callbacks,
        )

    return run


def without_times(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_same_run(one, other):
    assert without_times(one.evaluations) == without_times(other.evaluations)
    assert [record["loss"] for record in one.history] == [record["loss"] for record in other.history]
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_validation_data_that_break_do_not_cost_the_epoch(run, pictures, tmp_path):
    whole = run(name="whole")
    contents = {path: path.read_bytes() for path in pictures}

    def break_pictures(model):
        for path in pictures:
            path.write_bytes(b"no picture")

    with pytest.raises(ValueError, match="max_skipped: .* samples cannot be read"):
        run(callbacks=[Every(5, break_pictures)], delete_previous_checkpoint=True)
    folder = tmp_path / "logs" / "run" / "checkpoints"
    saved = load(folder / "epoch_2.pt")
    assert (saved["epoch"], saved["step"], saved["step_of_epoch"]) == (2, 6, 0)
    assert load(folder / "epoch_latest.pt")["step"] == 6
    assert (folder / "epoch_1.pt").is_file()  # until the epoch after it is validated

    with pytest.raises(ValueError, match="max_skipped: .* samples cannot be read"):
        run(resume="latest")
    for path, content in contents.items():
        path.write_bytes(content)
    resumed = run(resume="latest", delete_previous_checkpoint=True)

    assert [record["step"] for record in resumed.evaluations] == [3, 6, 9]
    assert_same_run(whole, resumed)
    assert {path.name for path in folder.iterdir()} == {"epoch_3.pt", "epoch_latest.pt"}


@pytest.mark.parametrize("epoch, validated", [(1, False), (3, True)])
def test_a_run_killed_around_a_validation_is_validated_once(run, monkeypatch, epoch, validated):
    whole = run(name="whole")
    validate = Trainer._validate

    def killed(trainer, at_end):
        if trainer.state.epoch != epoch or validated:
            validate(trainer, at_end)
        if trainer.state.epoch == epoch:
            raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", killed)
        with pytest.raises(SystemExit):
            run()
    torch.rand(5)

    assert_same_run(whole, run(resume="latest"))
