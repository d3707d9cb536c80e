"""The end of data workers that live longer than an epoch."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest
import torch
from picture_samples import preprocess, tokenizer
from torch.utils.data import DataLoader, Dataset

from clipup.data import processes
from clipup.data.loaders import train_loader
from clipup.data.processes import _prepare_worker, reading
from clipup.train.training_data import Epochs

QUICK = 3
"""Images that a worker reads before it hangs."""


class Hangs:
    """A transform that takes a minute from its fourth image on."""

    read = 0

    def __call__(self, image) -> torch.Tensor:
        self.read += 1
        time.sleep(60 if self.read > QUICK else 0)
        return preprocess(image)


class Pictures(Dataset):
    """Numbers of which reading the fourth takes a minute."""

    def __len__(self) -> int:
        return 4 * QUICK

    def __getitem__(self, index: int) -> int:
        time.sleep(60 if index >= QUICK else 0)
        return index


def hanging(pictures):
    """Epochs whose only worker hangs, and the worker."""
    epochs = Epochs(train_loader(pictures.csv(), Hangs(), tokenizer, batch_size=QUICK, workers=1), 1)
    batches = epochs.epoch(0)
    next(batches)
    batches.close()
    [worker] = epochs._batches.loader._iterator._workers
    return epochs, worker


@pytest.mark.slow
def test_workers_that_hang_are_killed(pictures):
    epochs, worker = hanging(pictures)
    epochs.close()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.slow
def test_workers_that_hang_when_an_iteration_is_left_are_killed():
    loader = DataLoader(Pictures(), batch_size=QUICK, num_workers=1, worker_init_fn=_prepare_worker)
    with pytest.raises(ZeroDivisionError), reading(loader) as batches:
        next(batches)
        [worker] = multiprocessing.active_children()
        1 / 0  # noqa: B018
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize("when", ["at exit", "when an iteration is left"])
def test_workers_that_hang_are_waited_for_together(monkeypatch, when):
    monkeypatch.setattr(processes, "_SECONDS_TO_END", 0.5)
    loader = DataLoader(Pictures(), batch_size=QUICK, num_workers=4, worker_init_fn=_prepare_worker)
    iterator = iter(loader)
    next(iterator)
    time.sleep(0.5)  # until all of them hang
    workers = iterator._workers
    before = signal.getsignal(signal.SIGCHLD)
    start = time.monotonic()
    if when == "at exit":
        processes._kill_daemons()
    else:
        processes._end_workers_of(iterator)
    assert time.monotonic() - start < 2
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()
    signal.signal(signal.SIGCHLD, before)
