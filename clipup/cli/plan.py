"""``clipup plan``: what a training run will need, before it is started."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..moe.config import MoEConfig
from ..moe.options import UNUSED, SparseOptions
from ..option_group import OptionGroup, all_idle, option
from ..precision import Precision
from ..train.objectives.options import PairLossOptions
from ..train.optimizer.options import TrainedPartsOptions
from ..train.parallel.options import ParallelOptions
from ..train.train_options import RESUMED, TrainOptions
from .flags import parse

if TYPE_CHECKING:
    from ..plan import Cluster, Plan
    from ..plan.report import Length


@dataclass(kw_only=True)
class RunOptions(OptionGroup):
    """What is planned, which the help shows first."""

    model: str
    """A model that open_clip knows, or a directory that clipup saved (dense or sparse)."""
    gpus: int
    """GPUs, each of which is a rank."""
    batch: int
    """Image-text pairs of one optimizer step, over all GPUs and accumulated batches."""
    moe: bool = False
    """Make the model sparse, with the options of MoEConfig below."""


@dataclass(kw_only=True)
class Options(ParallelOptions, PairLossOptions, TrainedPartsOptions, SparseOptions, RunOptions):
    """Plans a training run on several GPUs: memory of each, traffic of a step, hours, price, and a setting that fits.

    Example: clipup plan --model ViT-B-16 --moe --gpus 64 --batch 32768 --fsdp --ep 8

    Nothing is trained and no weights are read. Which numbers are exact, counted or modelled: docs/plan.md.
    """

    precision: Precision = "amp_bf16"
    """As in clipup train, whose default on CUDA is amp; with it, nothing can be sharded."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    accum_freq: int = 1
    """Batches per step: the loss is over all of them, with the memory of one."""
    caption_tokens: int | None = option(None, idle={"without --ep": lambda group: group.ep == 1})
    """Mean length of a caption in tokens, for the rows of sparse text layers. None: the whole context."""

    samples: int | None = option(None, least=1)
    """Pairs that the run sees in all."""
    epochs: int | None = option(None, least=1)
    """Or: passes over train_num_samples pairs."""
    train_num_samples: int | None = option(None, least=1)
    """Pairs of an epoch."""

    gpu: str = "h100"
    """h100, h200, b200, a100-80gb, a100-40gb or l40s: constants of data sheets, each of which an option overrides."""
    memory_gb: float | None = option(None, positive=True)
    """Memory of a GPU, 10^9 bytes."""
    tflops: float | None = option(None, positive=True)
    """Its peak in the run's type of products (bfloat16; float32 for fp32), without sparsity, 10^12 FLOPs per second."""
    link_gb_s: float | None = option(None, positive=True)
    """To the GPUs of its node, 10^9 bytes per second and direction."""
    network_gb_s: float | None = option(None, positive=True)
    """To other nodes, per GPU and direction."""
    host_gb_s: float | None = option(None, positive=True)
    """To the host's memory, per direction."""
    gpus_per_node: int = 8
    """GPUs that share fast links."""
    mfu: float = option(0.35, idle={"with --images-per-second": lambda group: group.images_per_second is not None})
    """Share of the peak at which products run, those that are computed again included. The default is an assumption."""
    images_per_second: float | None = None
    """Pairs per second of one GPU, measured with this setting on few GPUs; replaces FLOPs and mfu."""
    link_efficiency: float = 0.7
    """Share of the links' rates that collectives reach. The default is an assumption."""
    reserve: float = 0.1
    """Memory for the allocator's fragmentation, the CUDA context and NCCL, as a share of the rest. The default is an
    assumption."""
    price: float | None = option(
        None, idle={"without --samples, or --epochs and --train-num-samples": lambda group: group.length() is None}
    )
    """Of one GPU and hour, in any currency."""
    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """
        Raises:
            ValueError: an option has a value that is refused, or two contradict each other.
        """
        super().check()
        if self.samples is not None and self.epochs is not None:
            raise ValueError("samples and epochs both say how long the run is; use one")
        if (self.epochs is None) != (self.train_num_samples is None):
            raise ValueError("epochs counts passes over train_num_samples pairs; set both, or samples instead")

    def idle(self) -> dict[str, str]:
        return super().idle() | ({} if self.moe else all_idle(MoEConfig, UNUSED))

    def train_options(self) -> TrainOptions:
        given = {name: getattr(self, name, None) for name in RESUMED}
        return TrainOptions.flat(**{name: value for name, value in given.items() if value is not None})

    def cluster(self) -> Cluster:
        from ..plan import Cluster, Rates, card
        from ..train.cards import Card

        given: dict[str, Any] = {each.name: getattr(self, each.name, None) for each in dataclasses.fields(Card)}
        given = {name: value for name, value in given.items() if value is not None}
        rates = {each.name: getattr(self, each.name) for each in dataclasses.fields(Rates)}
        if self.tflops is not None:
            given["tflops_fp32"] = self.tflops
        return Cluster(
            self.gpus, dataclasses.replace(card(self.gpu), **given), Rates(**rates), self.reserve, self.price
        )

    def length(self) -> Length | None:
        """As ``clipup train`` reads indexed data: the last pairs of an epoch that fill no step are left out."""
        from ..plan.report import Length

        if self.epochs is not None and self.train_num_samples is not None:
            steps = self.epochs * (self.train_num_samples // self.batch)
            return Length(steps, steps * self.batch)
        return None if self.samples is None else Length(-(-self.samples // self.batch), self.samples)


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup plan")
    from ..plan import Subject, plan, propose
    from ..plan.report import as_json, as_text
    from ..train.optimizer.locks import lock_parts

    cluster = options.cluster()
    trained = options.train_options()
    moe = options.moe_cfg if options.moe else None
    subject = Subject.create(options.model, moe, options.precision, options.siglip)
    lock_parts(subject.model, trained.trained_parts)
    made = plan(subject, trained, cluster, options.batch, options.caption_tokens)
    proposed = propose(subject, trained, cluster, options.batch, options.caption_tokens)
    length = options.length()
    if options.json:
        best = None if proposed is None else as_json(proposed, cluster, length)
        print(json.dumps({"plan": as_json(made, cluster, length), "proposed": best}))
        return 0
    name = f"CLIP-UP of {options.model}" if options.moe else options.model
    run = f"{name} in {options.precision}, global batch {options.batch:,}, on {cluster.gpus} {options.gpu}"
    print(f"{run}\nconstants: {cluster.card.source}\n")
    print(as_text(made, cluster, length), _proposal(made, proposed, cluster), sep="\n")
    return 0


def _proposal(made: Plan, proposed: Plan | None, cluster: Cluster) -> str:
    from ..plan.report import summary

    if proposed is None:
        return "\nno setting fits: use more GPUs, GPUs with more memory, or a smaller batch"
    if proposed.setting() == made.setting():
        return "\nproposed: this setting"
    rule = "fits, and sends least of those whose modelled step is within 5 % of the shortest"
    if cluster.rates.images_per_second is not None:
        rule += "; timed by FLOPs and mfu, since the measured pace is that of the setting above"
    return f"\nproposed ({rule}):\n  {summary(proposed, cluster)}"
