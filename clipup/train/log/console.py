"""What a run shows on stderr: its progress, evaluations and warnings."""

from __future__ import annotations

from ...progress import Progress
from .recorder import Record, named_numbers

_PLACE = ("step", "epoch", "seconds")


class Console:
    """A progress bar on a terminal; elsewhere a line after the first step, occasional lines, and one after the last."""

    def __init__(self, total_steps: int, done: int, shown: bool) -> None:
        self._progress = Progress("training", "steps", total_steps, done, shown, line_at_once=True)
        self._record: Record = {}

    def logged(self, record: Record) -> None:
        """Sets the numbers to show from now on."""
        self._record = record

    def step(self, epoch: int) -> None:
        """Counts a step."""
        self._progress.update(1, self._detail(epoch))

    def evaluation(self, record: Record) -> None:
        """Prints the numbers of an evaluation, without those of its splits."""
        numbers = {key: value for key, value in record.items() if key not in (*_PLACE, "splits")}
        shown = ", ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in named_numbers("val", numbers))
        self.say(f"evaluation at step {record['step']}: {shown}")

    def say(self, text: str) -> None:
        self._progress.write(text)

    def close(self) -> None:
        self._progress.close()

    def _detail(self, epoch: int) -> str:
        record = self._record
        if not record:
            return f"epoch {epoch}"
        at = "" if record["step"] == self._progress.done + 1 else f" at step {record['step']}"
        return (
            f"epoch {epoch}, loss {record['loss']:.4f}{at}, lr {record['lr']:.3g}, "
            f"{record['images_per_second']:.0f} images/s"
        )
