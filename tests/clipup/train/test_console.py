"""What a run shows on stderr while it trains."""

from __future__ import annotations

import io
import re
import sys

import pytest

from clipup.train import Every, train

RECALL = "text_to_image_R@1"


@pytest.fixture
def run(make_model, pairs, options):
    def run(**changes):
        callbacks = [Every(4, lambda model: {RECALL: 0.25, "splits": {"emoji": {RECALL: 0.5}}})]
        return train(options(**changes), model=make_model(), loader=pairs(), callbacks=callbacks)

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_pipe_the_first_and_the_last_step_and_every_evaluation_have_a_line(run, capsys):
    run(steps=6)

    captured = capsys.readouterr()
    begin, first, at_4, at_6, last = captured.err.splitlines()
    assert re.fullmatch(r"training from step 0 to step 6 on cpu, 1 rank; .*logs/run", begin)
    assert re.fullmatch(r"training: 1 of 6 steps, epoch 0, loss \d\.\d+, lr 0.0005, \d+ images/s, 00:\d\d left", first)
    assert (at_4, at_6) == (
        "evaluation at step 4: text_to_image_R@1 0.25",
        "evaluation at step 6: text_to_image_R@1 0.25",
    )
    assert re.fullmatch(r"training: 6 of 6 steps, epoch 1, loss \d\.\d+, lr .*, \d+ images/s", last)
    assert captured.out == ""


def test_on_a_terminal_there_is_a_bar_with_evaluations_above_it(run, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(steps=6)

    shown = terminal.getvalue()
    assert "training:   0%|" in shown and "\nevaluation at step 4: text_to_image_R@1 0.25\n" in shown.replace(
        "\r", "\n"
    )
    assert "1 of 6 steps" not in shown
