"""Options of a run's directory: what is saved there, and how the run is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...checks import check
from ...option_group import OptionGroup, Resumed, option


@dataclass(kw_only=True)
class RunDirectoryOptions(OptionGroup):
    """Where a run is written, what is saved, and how it is resumed."""

    logs: str | None = option("./logs", Resumed.CALL)
    """Directory of runs. None (in Python only) writes nothing."""
    name: str | None = option(None, Resumed.CALL)
    """Name of the run, and of its directory under logs. None: date, model and learning rate."""
    resume: str | None = option(None, Resumed.CALL)
    """"latest" or the path of a checkpoint to continue from: the newest of this run, or any of another run. Changed
    options take effect from there on."""
    resume_with_changes: bool = option(False, Resumed.CALL)
    """On resume, accept a model, pretrained, moe, force_image_size and its like, train_data, seed, siglip or opt that
    differs from the checkpoint's, if its weights fit."""
    force: bool = option(False, Resumed.CALL, idle={"with --resume latest": lambda group: group.resume == "latest"})
    """Discard a run of the same name instead of refusing to start."""
    save_frequency: int = option(1, Resumed.FREE, least=0)
    """Epochs between two kept checkpoints (epoch_K.pt); 0 keeps none but the latest."""
    save_most_recent: bool = option(
        True,
        Resumed.FREE,
        idle={
            "with --fsdp-checkpoint sharded and --save-frequency 1": lambda group: (
                group.fsdp_checkpoint == "sharded" and group.save_frequency == 1
            )
        },
    )
    """Write epoch_latest.pt after every epoch (sharded: step_N, where no epoch_K is written). A run that ends or is
    stopped writes it in any case."""
    save_every_n_steps: int = option(0, Resumed.FREE, least=0)
    """Also write epoch_latest.pt after every n steps; 0 does not."""
    save_total_limit: int | None = option(None, Resumed.FREE, least=1)
    """Newest checkpoints that are kept; older ones are deleted. None keeps epoch_K and, of sharded ones, the last
    step_N. epoch_latest.pt is not counted."""
    fsdp_checkpoint: Literal["full", "sharded"] = option("full", Resumed.FREE)
    """full: one file in open_clip's format, which rank 0 writes while training waits. sharded: a directory to which
    every rank writes its part while training continues (torch.distributed.checkpoint), with or without fsdp. Both can
    be resumed with any parallelism, and clipup convert makes a model directory of both."""
    delete_previous_checkpoint: bool = option(
        False, Resumed.FREE, idle={"with --save-frequency 0": lambda group: group.save_frequency == 0}
    )
    """Delete the previous epoch_K.pt once the next one is written and validated."""

    def check(self) -> None:
        super().check()
        is_name = self.name is None or Path(self.name).name == self.name != ".."
        check("name", self.name, is_name, "the name of a directory, without separators")
        if self.resume == "latest" and (self.logs is None or self.name is None):
            raise ValueError("resume='latest' needs logs and name to find the checkpoints")
