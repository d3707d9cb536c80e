"""Many texts in two arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


class PackedTexts:
    """Texts by index. A list would be copied into every data worker: reading an object changes its reference count, and
    so the memory page that it shares with the parent process."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._content, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._content += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._content[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The texts as UTF-8, and where each ends. No text can be appended while they are in use."""
        return np.frombuffer(self._content, np.uint8), np.frombuffer(self._ends, np.int64)
