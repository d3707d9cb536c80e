"""A plan: memory, traffic, time and price of a run with given options, and the setting that suits it best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch

from .. import checks
from ..clip.inputs import text_length
from ..train.cards import Card
from ..train.parallel.options import ParallelOptions
from ..train.parallel.ranks import Ranks
from ..train.parallel.sharding import check
from ..train.train_options import TrainOptions
from .cost import Rates, StepTime, step_flops, step_time
from .memory import Memory, memory
from .subject import Subject
from .traffic import Transfer, traffic

SPREAD = [*(each.name for each in fields(ParallelOptions)), "grad_checkpointing", "accum_freq"]
"""The options that a proposal chooses."""
_AS_SHORT = 1.05


@dataclass(frozen=True)
class Cluster:
    """Where a run takes place."""

    gpus: int
    card: Card
    rates: Rates = Rates()
    reserve: float = 0.1
    """Share of a GPU's needed memory that is added for the allocator, the CUDA context and NCCL. An assumption."""
    price: float | None = None
    """Price of a GPU for an hour."""

    def __post_init__(self) -> None:
        checks.width("gpus", self.gpus)
        checks.check("reserve", self.reserve, 0 <= self.reserve < math.inf, "0 or more, and finite")


@dataclass(frozen=True)
class Plan:
    """What a run with these options needs."""

    options: TrainOptions
    memory: Memory
    traffic: list[Transfer]
    time: StepTime
    flops: float
    """FLOPs of one GPU in a step."""
    fits: bool
    """Whether a GPU has enough memory."""

    @property
    def wire(self) -> float:
        """Bytes that a rank sends in a step."""
        return sum(transfer.wire for transfer in self.traffic)

    def setting(self) -> dict[str, Any]:
        """The options of ``SPREAD``, and the batch size that follows from them."""
        values = self.options.values()
        return {name: values[name] for name in (*SPREAD, "batch_size")}

    def flags(self) -> str:
        """The setting as options of ``clipup train``."""
        chosen = {"batch_size": self.options.step.batch_size, "precision": self.options.speed.precision}
        chosen |= {name: value for name, value in self.setting().items() if value is True or value not in (False, 1)}
        flags = ((f"--{name.replace('_', '-')}", value) for name, value in chosen.items())
        return " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags)


def plan(
    subject: Subject, options: TrainOptions, cluster: Cluster, batch: int, caption_tokens: int | None = None
) -> Plan:
    """What one setting of a training run needs on every rank: memory, traffic and time of a step.

    Args:
        subject: the model that is trained, dense or sparse.
        options: those of the run; batch_size is overridden, by what a rank has of the global batch.
        cluster: the GPUs, their links and rates.
        batch: pairs of one optimizer step, over all ranks and accumulated batches.
        caption_tokens: mean length of a caption, for the rows of sparse text layers; None: the whole context.

    Raises:
        ValueError: the batch cannot be divided among the ranks, captions are longer than the context, or ``clipup
            train`` would refuse the options.
    """
    if caption_tokens is not None:
        longest = text_length(subject.model)
        checks.check("caption_tokens", caption_tokens, 1 <= caption_tokens <= longest, f"1 to {longest}, the context")
    parts = cluster.gpus * options.step.accum_freq
    if batch % parts:
        raise ValueError(
            f"batch must be a multiple of gpus * accum_freq = {cluster.gpus} * {options.step.accum_freq}, got {batch}"
        )
    options = options.changed(batch_size=batch // parts, precision=subject.precision)
    check(subject.model, options.parallel, Ranks(torch.device("meta"), world_size=cluster.gpus))
    required = memory(subject, options, cluster.gpus, cluster.reserve)
    transfers = traffic(subject, options, cluster.gpus, caption_tokens)
    updated_bytes = sum(unit.trained_bytes for unit in subject.units(options, cluster.gpus))
    time = step_time(subject, options, cluster.gpus, cluster.card, cluster.rates, transfers, updated_bytes)
    fits = required.bytes <= cluster.card.memory_gb * 1e9
    return Plan(options, required, transfers, time, step_flops(subject, options, cluster.gpus), fits)


def propose(
    subject: Subject, options: TrainOptions, cluster: Cluster, batch: int, caption_tokens: int | None = None
) -> Plan | None:
    """The setting that sends the fewest bytes, among those that fit and whose step is at most 5 % longer than the
    shortest: a time is a model, so smaller differences say nothing. None if no setting fits.

    It varies the options of ``SPREAD``; the others stay. A measured ``images_per_second`` belongs to one setting, so
    that settings are compared by FLOPs.
    """
    compared = replace(cluster, rates=replace(cluster.rates, images_per_second=None))
    plans = []
    for setting in _settings(subject, cluster, batch):
        with suppress(ValueError):  # a combination that clipup train refuses
            plans.append(plan(subject, options.changed(**setting), compared, batch, caption_tokens))
    plans = [candidate for candidate in plans if candidate.fits]
    if not plans:
        return None
    shortest = min(candidate.time.total for candidate in plans)
    return min(
        (candidate for candidate in plans if candidate.time.total <= _AS_SHORT * shortest),
        key=lambda candidate: candidate.wire,
    )


def _settings(subject: Subject, cluster: Cluster, batch: int) -> Iterator[dict[str, Any]]:
    gpus, node = cluster.gpus, cluster.rates.gpus_per_node
    replicas = [1, gpus // node] if gpus > node and gpus % node == 0 else [1]
    spreads: list[dict[str, Any]] = [
        vars(ParallelOptions()),
        *(
            {"fsdp": True, "fsdp_replicas": count, "fsdp_no_reshard_after_forward": kept}
            for count, kept in product(replicas if gpus > 1 else [], (False, True))
        ),
    ]
    experts = max((config.num_experts for config in subject.sparse.values()), default=1)
    divisors = [n for n in range(1, experts + 1) if experts % n == 0 and gpus % n == 0]
    accumulated = [2**i for i in range(7) if batch % (gpus * 2**i) == 0]
    for spread, ep, checkpointed, count in product(spreads, divisors, (False, True), accumulated):
        yield {**spread, "ep": ep, "grad_checkpointing": checkpointed, "accum_freq": count}
