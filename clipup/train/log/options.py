"""Options of what is recorded, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from ...checks import check
from ...option_group import OptionGroup, Resumed, option


@dataclass(kw_only=True)
class ReportingOptions(OptionGroup):
    """Which numbers are recorded, and where they go besides the run's directory."""

    log_every_n_steps: int = option(1, Resumed.FREE, least=1)
    """Steps between two records in metrics.jsonl."""
    report_to: str = option("", Resumed.FREE)
    """Programs that get the metrics too, separated by commas: tensorboard, wandb, trackio, or all (tensorboard and
    wandb). wandb records offline, into the run's directory, unless WANDB_MODE=online is set."""
    wandb_project_name: str = option(
        "open-clip",
        Resumed.FREE,
        idle={"without --report-to wandb or trackio": lambda group: not group.trackers() & {"wandb", "trackio"}},
    )
    """Project of the run for wandb or trackio."""
    wandb_notes: str = option(
        "", Resumed.FREE, idle={"without --report-to wandb": lambda group: "wandb" not in group.trackers()}
    )
    """Notes on the run for wandb."""

    def check(self) -> None:
        super().check()
        trackers = {"tensorboard", "wandb", "trackio"}
        expected = f"some of {', '.join(sorted(trackers))}, all, separated by commas"
        check("report_to", self.report_to, self.trackers() <= trackers, expected)

    def trackers(self) -> set[str]:
        """The programs of ``report_to``."""
        names = {name.strip() for name in self.report_to.split(",") if name}
        return names - {"all"} | ({"tensorboard", "wandb"} if "all" in names else set())
