"""Options of where and how a run computes, and of what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...checks import check
from ...option_group import OptionGroup


@dataclass(kw_only=True)
class SpeedOptions(OptionGroup):
    """Precision, memory and speed of a step."""

    precision: Literal["fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16"] | None = None
    """fp32, amp (float16 autocast), amp_bf16 or amp_bfloat16 (bfloat16 autocast) or bf16 (the model itself). None: amp
    on CUDA, amp_bf16 there with fsdp or ep; else fp32."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    torchcompile: bool = False
    """Compile the model's forward and backward pass with torch.compile, sparse layers included. The first step takes
    much longer."""
    torchcompile_backend: str | None = None
    """Backend of torch.compile. None: inductor."""
    torchcompile_mode: str | None = None
    """Mode of the backend inductor: default, reduce-overhead, max-autotune."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: cuda if torch finds a GPU, else cpu."""

    def check(self) -> None:
        if self.precision == "amp_bfloat16":  # open_clip's second name
            self.precision = "amp_bf16"


@dataclass(kw_only=True)
class ProcessOptions(OptionGroup):
    """Runs of several processes, under torchrun."""

    dist_backend: str | None = None
    """torch.distributed backend under torchrun. None: nccl on CUDA, gloo on CPU."""
    dist_timeout: float = 1800.0
    """With several ranks: seconds that a rank waits for the others within a step before the run ends. Evaluations and
    checkpoints may take longer."""

    def check(self) -> None:
        self.positive("dist_timeout")


@dataclass(kw_only=True)
class ParallelOptions(OptionGroup):
    """How several ranks divide a model (docs/distributed.md)."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the ranks (FSDP2) instead of replicating them (DDP)."""
    fsdp_replicas: int = 1
    """Copies of a model sharded with fsdp: the ranks form that many groups, and each group holds a whole one (HSDP)."""
    fsdp_no_reshard_after_forward: bool = False
    """Keep a block's gathered weights from its forward to its backward pass: less communication, more memory."""
    fsdp_offload_cpu: bool = False
    """Keep the shards of weights, gradients and optimizer state in the CPU's memory."""
    ep: int = 1
    """Expert parallelism: ranks over which each layer's experts are divided; tokens travel to the ranks of their
    experts. It divides the number of experts and of ranks."""

    def check(self) -> None:
        self.at_least(1, "fsdp_replicas", "ep")

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all weights, so that all ranks must run the same forward passes."""
        return self.fsdp or self.ep > 1


@dataclass(kw_only=True)
class RunDirectoryOptions(OptionGroup):
    """Where a run is written, what is saved, and how it is resumed."""

    logs: str | None = "./logs"
    """Directory of runs. None (in Python only) writes nothing."""
    name: str | None = None
    """Name of the run, and of its directory under logs. None: date, model and learning rate."""
    resume: str | None = None
    """"latest" or the path of a checkpoint to continue from: the newest of this run, or any of another run. Changed
    options take effect from there on."""
    resume_with_changes: bool = False
    """On resume, accept a model, pretrained, moe, train_data, seed, siglip or opt that differs from the checkpoint's,
    if its weights fit."""
    force: bool = False
    """Discard a run of the same name instead of refusing to start."""
    save_frequency: int = 1
    """Epochs between two kept checkpoints (epoch_K.pt); 0 keeps none but the latest."""
    save_most_recent: bool = True
    """Write epoch_latest.pt after every epoch."""
    save_every_n_steps: int = 0
    """Also write epoch_latest.pt after every n steps; 0 does not."""
    save_total_limit: int | None = None
    """Newest checkpoints that are kept; older ones are deleted. None keeps epoch_K and, of sharded ones, the last
    step_N. epoch_latest.pt is not counted."""
    fsdp_checkpoint: Literal["full", "sharded"] = "full"
    """full: one file in open_clip's format, which rank 0 writes while training waits. sharded: a directory to which
    every rank writes its part while training continues (torch.distributed.checkpoint), with or without fsdp. Both can
    be resumed with any parallelism, and clipup convert makes a model directory of both."""
    delete_previous_checkpoint: bool = False
    """Delete the previous epoch_K.pt once the next one is written and validated."""

    def check(self) -> None:
        self.at_least(0, "save_frequency", "save_every_n_steps")
        self.at_least(1, "save_total_limit")
        is_name = self.name is None or Path(self.name).name == self.name != ".."
        check("name", self.name, is_name, "the name of a directory, without separators")
        if self.resume == "latest" and (self.logs is None or self.name is None):
            raise ValueError("resume='latest' needs logs and name to find the checkpoints")


@dataclass(kw_only=True)
class RemoteSyncOptions(OptionGroup):
    """Copies of the run's directory at another place, made while the run continues."""

    remote_sync: str | None = None
    """Where the run's directory is copied to, under its name: s3://BUCKET/PATH (with the package s3fs), or another URL
    of fsspec. Files that have changed are copied."""
    remote_sync_frequency: float = 300
    """Seconds between two copies; one more is made at the end."""

    def check(self) -> None:
        self.positive("remote_sync_frequency")


@dataclass(kw_only=True)
class ReportingOptions(OptionGroup):
    """Which numbers are recorded, and where they go besides the run's directory."""

    log_every_n_steps: int = 1
    """Steps between two records in metrics.jsonl."""
    report_to: str = ""
    """Programs that get the metrics too, separated by commas: tensorboard, wandb, trackio, or all (tensorboard and
    wandb). wandb records offline, into the run's directory, unless WANDB_MODE=online is set."""
    wandb_project_name: str = "open-clip"
    """Project of the run for wandb or trackio."""
    wandb_notes: str = ""
    """Notes on the run for wandb."""

    def check(self) -> None:
        self.at_least(1, "log_every_n_steps")
        known = {"tensorboard", "wandb", "trackio"}
        expected = f"some of {', '.join(sorted(known))}, all, separated by commas"
        check("report_to", self.report_to, self.trackers() <= known, expected)

    def trackers(self) -> set[str]:
        """The programs of ``report_to``."""
        names = {name.strip() for name in self.report_to.split(",") if name}
        return names - {"all"} | ({"tensorboard", "wandb"} if "all" in names else set())
