"""Requests to stop: the first ends a run after its step, a second one at once; an ignored one stays ignored."""

import os
import signal

import pytest

from clipup.train import Every, TrainingInterrupted
from clipup.train.checkpoints.format import load
from clipup.train.signals import StopRequest


def sending(step, *numbers):
    return [Every(step, lambda model: [os.kill(os.getpid(), number) for number in numbers] and None)]


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A shell's background jobs ignore Ctrl-C from the start, programs under nohup SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("numbers", [("SIGINT",), ("SIGTERM",), ("SIGHUP",), ("SIGTERM",) * 3, ("SIGINT", "SIGTERM")])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(run, numbers):
    """torchrun sends a second SIGTERM to ranks that already have it."""
    before = signal.getsignal(signal.SIGTERM)

    message = "after step 2 of 9.*--name run --resume latest and without --force"
    with pytest.raises(TrainingInterrupted, match=message) as stopped:
        run(sending(2, *(getattr(signal, name) for name in numbers)), force=True)

    assert load(stopped.value.checkpoint)["step"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_stops_at_once(run):
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(sending(1, signal.SIGINT, signal.SIGINT))

    assert not isinstance(stopped.value, TrainingInterrupted)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert not stop.received and signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
