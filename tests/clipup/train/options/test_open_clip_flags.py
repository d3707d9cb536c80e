"""Command lines written for open_clip_train: its options are ours, or are refused by name with what to do instead."""

from __future__ import annotations

import argparse

import open_clip_train.params
import pytest

from clipup.cli import main
from clipup.cli.open_clip_flags import INSTEAD
from clipup.cli.train import FLAGS


@pytest.fixture
def flags_of_open_clip(monkeypatch):
    """All flags of the installed open_clip_train."""

    def stop(parser, *_):
        raise InterruptedError(*(action.option_strings[0] for action in parser._actions[1:]))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(InterruptedError) as flags:
        open_clip_train.params.parse_args([])
    return set(flags.value.args)


def test_every_flag_of_open_clip_train_is_ours_or_explained(flags_of_open_clip):
    assert len(flags_of_open_clip) > 80
    assert flags_of_open_clip - set(FLAGS) - set(INSTEAD) == set()


@pytest.mark.parametrize("flag", ["--copy-codebase", "--naflex-seq-lens=64", "--val_num_samples"])
def test_a_flag_of_open_clip_train_that_is_not_ours_is_refused_in_one_line(capsys, flag):
    assert main(["train", "--model", "ViT-B-32", flag, "3"]) == 2

    name = flag.partition("=")[0]
    instead = INSTEAD[name.replace("_", "-")]
    error = f"clipup train: {name} is an option of open_clip_train that clipup does not have: {instead}\n"
    assert capsys.readouterr().err == error
