"""Command lines written for open_clip_train: its options are ours, or are refused by name with what to do instead."""

import argparse

import open_clip_train.params
import pytest

from clipup.cli import main
from clipup.cli.open_clip_flags import INSTEAD
from clipup.cli.train import FLAGS


def test_every_flag_of_open_clip_train_is_ours_or_explained(monkeypatch):
    flags = set()
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", lambda parser, name, *more, **how: flags.add(name))
    with pytest.raises(AttributeError):  # of an argument that was not added
        open_clip_train.params.parse_args([])

    assert len(flags) > 80 and flags - set(FLAGS) - set(INSTEAD) == {"-h"}


@pytest.mark.parametrize("flag", ["--copy-codebase", "--naflex-seq-lens=64", "--val_num_samples"])
def test_a_flag_of_open_clip_train_that_is_not_ours_is_refused_in_one_line(capsys, flag):
    assert main(["train", "--model", "ViT-B-32", flag, "3"]) == 2

    name = flag.partition("=")[0]
    instead = INSTEAD[name.replace("_", "-")]
    error = f"clipup train: {name} is an option of open_clip_train that clipup does not have: {instead}\n"
    assert capsys.readouterr().err == error
