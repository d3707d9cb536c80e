"""The random number generators of a process: seeding, and putting them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, *more: int) -> None:
    """Seeds Python, NumPy and torch from integers >= 0, for example a run's seed, an epoch and a rank."""
    mixed = int(np.random.SeedSequence((seed, *more)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def torch_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators of the CPU and the device."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_torch_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def get_state(device: torch.device) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The state of all generators."""
    return random.getstate(), np.random.get_state(), torch_state(device)


def set_state(state: tuple[Any, Any, dict[str, torch.Tensor]], device: torch.device) -> None:
    of_python, of_numpy, of_torch = state
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    set_torch_state(of_torch, device)


class Stream:
    """A separate stream of random numbers: those drawn inside ``drawing()`` depend only on earlier draws there."""

    def __init__(self, device: torch.device, *seed: int) -> None:
        self._device = device
        with preserved(device):
            seed_everything(*seed)
            self._state = get_state(device)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        with preserved(self._device):
            set_state(self._state, self._device)
            try:
                yield
            finally:
                self._state = get_state(self._device)


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Restores all generators at the end, so that random numbers drawn inside do not change a run."""
    state = get_state(device)
    try:
        yield
    finally:
        set_state(state, device)
