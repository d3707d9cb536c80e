"""Training data as the steps of a run, and what could not be read of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ..data.processes import end_workers
from ..data.skips import union
from ..data.train_data import TrainData
from .objectives.objective import Batch


class Epochs:
    """Training data as steps: lists of ``accum_freq`` batches of (images [B, 3, H, W], texts [B, context_length])."""

    def __init__(self, loader: Any, accum_freq: int) -> None:
        """
        Args:
            loader: ``TrainData``, or anything with a length that can be iterated repeatedly.

        Raises:
            ValueError: fewer than ``accum_freq`` batches per epoch, or ``TrainData`` for another ``accum_freq``.
        """
        if isinstance(loader, TrainData) and (made_with := loader.reader.step.accum_freq) != accum_freq:
            raise ValueError(f"accum_freq is {accum_freq}, but the loader was made with {made_with}")
        self._info = loader
        self.order: dict[str, Any] | None = getattr(loader, "order", None)
        """What the samples of a step depend on besides seed and epoch; None where an epoch can only be read from its
        start."""
        self.streamed = self.order is None and isinstance(loader, TrainData)
        self._batches = getattr(loader, "dataloader", loader)
        self._skips = getattr(loader, "skips", None)
        self._accum_freq = accum_freq
        count = self._batches.num_batches if hasattr(self._batches, "num_batches") else len(self._batches)
        self.steps = count // accum_freq
        """Steps of an epoch."""
        if self.steps == 0:
            raise ValueError(
                f"accum_freq: got {accum_freq}, more than the batches of an epoch ({count}); lower batch_size or "
                "accum_freq, or pass more data"
            )

    def check_alike(self, gather: Callable[[Any], list[Any]]) -> None:
        """
        Args:
            gather: returns every rank's value on every rank.

        Raises:
            ValueError: ranks have other options of the data, or have found other samples, so that some would be trained
                on twice and others not at all.
        """
        mine = self._info.of_all_ranks() if isinstance(self._info, TrainData) else {}
        mine |= {"steps of an epoch": self.steps, **(self.order or {})}
        if self.streamed:
            mine["digest of the shards"] = self._info.shards
        first, *others = gather(mine)
        for rank, other in enumerate(others, 1):
            differing = [
                f"{name} {first[name]!r} and {other.get(name)!r}" for name in first if other.get(name) != first[name]
            ]
            if differing:
                raise ValueError(
                    f"train_data: ranks 0 and {rank} differ in {', '.join(differing)}. Give every rank the same "
                    "options and the same files in the same state; the logs name what could not be read"
                )

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[list[Batch], None, None]:
        """The steps of an epoch from ``first_step``, which is 0 without ``order``; batches left over at its end are not
        used. Close it to end its data workers."""
        if first_step:
            self._info.set_epoch(epoch, first_step)
        elif hasattr(self._info, "set_epoch"):
            self._info.set_epoch(epoch)
        group: list[Batch] = []
        for images, texts in self._batches:
            group.append((images, texts))
            if len(group) == self._accum_freq:
                yield group
                group = []

    def restore(self, skipped: dict[str, int]) -> None:
        """Counts what was skipped before the run was resumed."""
        if self._skips is not None:
            self._skips.restore(skipped)

    def skipped(self, gather: Callable[[Any], list[Any]]) -> dict[str, int]:
        """The samples that could not be read so far, each counted once, whichever ranks met it.

        Args:
            gather: returns every rank's value on every rank.
        """
        return union(gather(getattr(self._skips, "samples", {})))

    def check_skipped(self, gather: Callable[[Any], list[Any]]) -> None:
        """Judges ``max_skipped`` over all ranks at the end of an epoch. Within an epoch every rank judges its own part,
        with an allowance for chance.

        Raises:
            ValueError: more samples of the epoch could not be read than may be skipped.
        """
        counts = getattr(self._batches, "pass_counts", None)
        if counts is None:
            return
        met, skipped = counts
        self._skips.check_together(sum(gather(met)), skipped, gather)

    def close(self) -> None:
        """Releases the loader, so that workers that live longer than an epoch end with the run."""
        if isinstance(self._info, TrainData):
            end_workers(getattr(self._batches, "loader", None))
        self._info = self._batches = None
