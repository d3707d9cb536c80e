"""The share of a GPU's peak that the products of a model take (MFU; PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import torch
from torch import nn

from ...clip.flops import count
from ..cards import card_of

_PASSES = 3
"""A backward pass has the products of two forward passes. What is computed again is not counted."""


def peak_tflops(device: torch.device) -> float | None:
    """10^12 FLOPs per second of dense bfloat16 products, by the vendor's data sheet; None for what has none here."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else card.tflops


class Utilization:
    """MFU of training: FLOPs of both towers, as if no token were dropped and every text as long as the context."""

    def __init__(self, model: nn.Module, world_size: int, peak: float | None) -> None:
        """
        Args:
            model: before it is sharded.
            peak: 10^12 FLOPs per second of a rank's device, if known.
        """
        self._pairs_per_second: float | None = None
        """At the peak, of all ranks."""
        self.note = ""
        """Why there is no MFU although the peak is known."""
        if peak is None:
            return
        try:
            counts = count(model)
        except Exception as error:  # a model that can be trained and not be counted is trained
            self.note = f"mfu is not logged, the model's FLOPs cannot be counted: {type(error).__name__}: {error}"
            return
        gflops = _PASSES * (counts.image_gflops + counts.text_gflops)
        self._pairs_per_second = world_size * peak * 1e3 / gflops

    def of(self, pairs_per_second: float) -> dict[str, float]:
        """``mfu`` for a record; nothing if the peak is not known.

        Args:
            pairs_per_second: of all ranks.
        """
        return {} if self._pairs_per_second is None else {"mfu": pairs_per_second / self._pairs_per_second}
