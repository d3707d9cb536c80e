"""Options of a training run. Options shared with open_clip_train have the same names and meanings."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.images import check_max_pixels
from ..data.options import DataOptions, SourceOptions
from ..data.skips import check_max_skipped
from ..moe.config import MoEConfig
from ..precision import Precision, default_device, default_workers
from .objectives import check_options


@dataclass
class TrainOptions:
    """Trains a CLIP, dense or sparse, on image-text pairs.

    Example: clipup train --model ViT-B-16 --pretrained laion2b_s34b_b88k --moe --train-data 'data/{000..099}.tar'
    --train-num-samples 1000000 --batch-size 512 --lr 5e-5 --warmup 500 --steps 20000 --name b16-moe

    Several ranks: torchrun --nproc-per-node 8 -m clipup -- train --model ...
    """

    model: str | None = None
    """A model that open_clip knows, or a directory that clipup saved (dense or sparse)."""
    pretrained: str | None = None
    """Tag or file of open_clip weights for a model known by name, or a directory with weights. None: random weights."""
    moe: bool = False
    """Make the model sparse before training, with the options of MoEConfig below."""
    moe_cfg: MoEConfig = field(default_factory=MoEConfig.clip_up)
    """Sparse layers for --moe; the defaults are CLIP-UP's recipe."""
    resume_dense: str | None = None
    """Checkpoint of a dense run (epoch_K.pt, ours or open_clip_train's) to start --moe from: its weights, and Adam's
    moments for every expert. Steps and schedule start at zero."""

    train_data: str | None = None
    """CSV file, or WebDataset shards ("data/{000..099}.tar", several joined by "::")."""
    train_num_samples: int | None = None
    """Samples in an epoch, for WebDataset shards without a sizes.json."""
    dataset_type: Literal["webdataset", "csv", "auto"] = DataOptions.dataset_type
    """What train_data is; auto goes by its ending."""
    dataset_resampled: bool = DataOptions.dataset_resampled
    """Draw shards with replacement."""
    csv_separator: str = DataOptions.csv_separator
    """Separates the columns of a CSV file."""
    csv_img_key: str = DataOptions.csv_img_key
    """Column with the paths of the images."""
    csv_caption_key: str = DataOptions.csv_caption_key
    """Column with the captions."""
    max_skipped: float = DataOptions.max_skipped
    """Share of the samples that may be unreadable: they are left out, each is named once, and the last line says how
    many. Above it the run stops."""
    max_image_pixels: int = DataOptions.max_image_pixels
    """Pixels of an image that is decoded at most; one of more counts as unreadable."""
    allow_pipe: bool = DataOptions.allow_pipe
    """Let pipe:COMMAND in train_data run its command in a shell. Only for a train_data that you trust."""
    cache_data: bool = DataOptions.cache
    """Decode and tokenize the whole training set once and keep it in memory (small sets)."""
    val_data: str | None = None
    """CSV file or shards for retrieval after every val_frequency epochs and at the end."""
    val_frequency: int = 1
    """Epochs between two evaluations; 0 evaluates at the end only."""
    workers: int = field(default_factory=default_workers)
    """Data loader processes a rank."""

    batch_size: int = 64
    """Images per batch and rank."""
    accum_freq: int = 1
    """Batches per step: the loss is over all of them, with the memory of one."""
    epochs: int = 32
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps after which to stop; overrides epochs."""
    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.98
    """AdamW's second beta."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    wd: float = 0.2
    """Weight decay of matrices; biases, norms and the logit scale are not decayed."""
    warmup: int = 10000
    """Steps over which the learning rate rises to lr."""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """After warm-up: down to 0 along a cosine, or constant."""
    skip_scheduler: bool = False
    """Use a constant lr without warm-up."""
    grad_clip_norm: float | None = None
    """Largest norm of the gradient; None does not clip."""
    max_nonfinite_steps: int = 10
    """Consecutive steps that may be skipped because their gradient is NaN or infinite; one more ends the run."""
    distill_model: str | None = None
    """Teacher: a model that open_clip knows, or a directory. Its similarities are a second target (DistillClipLoss). It
    must take the same images and tokens; the dense model that --moe starts from does."""
    distill_pretrained: str | None = None
    """Tag or file of the teacher's weights, for a model known by name."""
    siglip: bool = False
    """Use the sigmoid loss (SigLIP) instead of the softmax loss (CLIP)."""
    multi_positive: bool = False
    """Do not treat pairs of a batch with equal captions as negatives of each other; on val_data every image of a
    caption counts as a correct answer to it. Not with siglip."""
    coca_caption_loss_weight: float = 2.0
    """Weight of the captioning loss, for a CoCa."""
    coca_contrastive_loss_weight: float = 1.0
    """Weight of the contrastive loss, for a CoCa."""
    local_loss: bool = True
    """With several ranks: every rank computes the logits of its own images and texts only."""
    gather_with_grad: bool = True
    """With several ranks: gradients flow through gathered features. With neither this nor local_loss the contrastive
    gradient is 1/ranks of the true one, while the router's losses keep their scale."""
    loss_chunk_size: int | None = None
    """Images (and texts) of a rank whose logits are computed at once, and again in the backward pass, so that memory
    never holds all. None: as many as have 2^26 logits. With a teacher, and in a CoCa, it is all of them."""
    precision: Precision | None = None
    """fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (the model itself). None: amp on CUDA, else
    fp32."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    device: str = field(default_factory=default_device)
    """cpu, cuda or cuda:N."""
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
    dist_backend: str | None = None
    """torch.distributed backend under torchrun. None: nccl on CUDA, gloo on CPU."""
    dist_timeout: float = 1800.0
    """With several ranks: seconds without a heartbeat from a rank, or within one step, after which the run ends.
    Evaluations and checkpoints may take longer."""
    seed: int = 0
    """Seed of weights, data order and noise."""

    logs: str | None = "./logs"
    """Directory of runs. None (in Python only) writes nothing."""
    name: str | None = None
    """Name of the run, and of its directory under logs. None: date, model and learning rate."""
    resume: str | None = None
    """"latest" or the path of a checkpoint to continue from. Changed options take effect from there on."""
    resume_with_changes: bool = False
    """On resume, accept a model, moe, train_data, seed or siglip that differs from the checkpoint's."""
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
    every rank writes its part while training goes on (torch.distributed.checkpoint), with or without fsdp. Both can be
    resumed with any parallelism, and clipup convert makes a model directory of both."""
    delete_previous_checkpoint: bool = False
    """Delete the previous epoch_K.pt once the next one is written and validated."""
    log_every_n_steps: int = 1
    """Steps between two records in metrics.jsonl."""
    report_to: Literal["", "tensorboard"] = ""
    """tensorboard also writes the metrics for TensorBoard."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accum_freq", "epochs", "log_every_n_steps", "fsdp_replicas", "ep"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            *("seed", "warmup", "workers", "val_frequency", "save_frequency", "save_every_n_steps", "wd", "eps"),
            "max_nonfinite_steps",
        ):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("steps", "train_num_samples", "loss_chunk_size", "save_total_limit"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        timeout = self.dist_timeout
        self._check("dist_timeout", math.isfinite(timeout) and timeout > 0, "a positive number of seconds")
        kinds = ("full", "sharded")
        self._check("fsdp_checkpoint", self.fsdp_checkpoint in kinds, " or ".join(map(repr, kinds)))
        check_max_skipped(self.max_skipped)
        check_max_pixels(self.max_image_pixels)
        self._check("lr", math.isfinite(self.lr) and self.lr > 0, "a positive number")
        self._check("grad_clip_norm", self.grad_clip_norm is None or self.grad_clip_norm > 0, "positive, or None")
        for name in ("beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        if self.name is not None:
            self._check("name", Path(self.name).name == self.name, "the name of a directory, without separators")
        check_options(self)
        if self.resume_dense is not None and not self.moe:
            raise ValueError(
                f"resume_dense={self.resume_dense!r} starts a sparse model, which needs moe; set moe, or continue the "
                "dense run with resume"
            )
        if self.resume_dense is not None and self.pretrained is not None:
            raise ValueError(
                f"resume_dense={self.resume_dense!r} and pretrained={self.pretrained!r} both select weights; use one"
            )
        for name in ("fsdp_replicas", "fsdp_no_reshard_after_forward", "fsdp_offload_cpu"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and not self.fsdp:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without fsdp; set it too")
        if self.resume == "latest" and (self.logs is None or self.name is None):
            raise ValueError("resume='latest' needs logs and name to find the checkpoints")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def data_options(self) -> DataOptions:
        """How the training data are read."""
        names = {field.name for field in dataclasses.fields(DataOptions)} - {"cache"}
        return DataOptions(**{name: getattr(self, name) for name in names}, cache=self.cache_data)

    def val_data_options(self) -> SourceOptions:
        """How ``val_data`` is read; its format goes by its file extension."""
        names = {field.name for field in dataclasses.fields(SourceOptions)} - {"dataset_type"}
        return SourceOptions(**{name: getattr(self, name) for name in names})

    def to_json(self) -> str:
        """All options as JSON, for the options.json of a run."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["moe_cfg"] = self.moe_cfg.to_dict() if self.moe else None
        return json.dumps(values, indent=2) + "\n"
