"""What data workers run in tests. Workers that are not forked (macOS; Python 3.14) import it by name."""

from __future__ import annotations

import time
from pathlib import Path

from picture_samples import preprocess
from torch.utils.data import Dataset

QUICK = 3
"""Items that are read before one that takes minutes."""


class Hangs(Dataset):
    """Numbers; reading those from the fourth on takes minutes."""

    def __len__(self) -> int:
        return 4 * QUICK

    def __getitem__(self, index: int) -> int:
        time.sleep(600 if index >= QUICK else 0)
        return index


class Repairable:
    """A transform that returns no tensor until a file exists."""

    def __init__(self, repaired: Path) -> None:
        self.repaired = repaired

    def __call__(self, image):
        return preprocess(image) if self.repaired.exists() else image


def at_seven(number):
    if number == 7:
        raise KeyError("seven")
    return number
