"""Time of a step and price of a run, from FLOPs, traffic and the constants of a card. All of it is a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..checks import check, positive_number, width
from ..train.cards import Card
from ..train.objectives.selection import selected
from ..train.train_options import TrainOptions
from .subject import Subject
from .traffic import Transfer, forward_passes

_UPDATE_BYTES = 7
"""Bytes that AdamW moves for each byte of a parameter: it reads weight, gradient and two moments, and writes weight and
moments."""


@dataclass(frozen=True)
class Rates:
    """What a run reaches, given or measured."""

    mfu: float = 0.35
    """Share of the card's peak at which products run, those that are computed again included. An assumption until it is
    measured."""
    images_per_second: float | None = None
    """Pairs per second and GPU of this setting, measured without communication; overrides mfu."""
    link_efficiency: float = 0.7
    """Share of the links' rates that collectives reach. An assumption until it is measured."""
    gpus_per_node: int = 8
    """GPUs that share fast links."""

    def __post_init__(self) -> None:
        for name in ("mfu", "link_efficiency"):
            check(name, getattr(self, name), 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        if self.images_per_second is not None:
            positive_number("images_per_second", self.images_per_second)
        width("gpus_per_node", self.gpus_per_node)


class StepTime(NamedTuple):
    """Seconds of one optimizer step."""

    compute: float
    update: float
    by_kind: dict[str, float]
    """Seconds of each kind of traffic."""
    exposed: float
    """Seconds of traffic that computation does not hide. Gradients and parameters travel beside computation, the rest
    does not."""

    @property
    def total(self) -> float:
        return self.compute + self.update + self.exposed

    @property
    def limit(self) -> str:
        """What takes the largest part of a step."""
        parts = {"compute": self.compute, "communication": self.exposed, "optimizer": self.update}
        return max(parts, key=lambda name: parts[name])


def step_flops(subject: Subject, options: TrainOptions, gpus: int) -> float:
    """FLOPs of one GPU and step: a backward pass costs two forward passes; checkpointing and accumulation each
    add a pass. A tower that is locked whole has forward passes alone; a tower that is locked in part counts as trained.
    """
    counts, of_trained = subject.counts, subject.trained_towers(options)
    own = options.step.batch_size * options.step.accum_freq
    forward = forward_passes(options)
    trained = forward + options.step.accum_freq * (3 if options.speed.grad_checkpointing else 2)
    passes = {tower: trained if tower in of_trained else forward for tower in ("image", "text")}
    gflops = counts.image_gflops * passes["image"] + counts.text_gflops * passes["text"]
    towers = gflops * 1e9 * options.step.batch_size
    loss = selected(options.loss)
    rows = loss.rows(options.loss, own, own * gpus)
    logits = loss.directions * 2.0 * rows * own * gpus * len(subject.feature(options)) * 3 * options.step.accum_freq
    return towers + logits


def step_time(
    subject: Subject,
    options: TrainOptions,
    gpus: int,
    card: Card,
    rates: Rates,
    transfers: list[Transfer],
    held_bytes: float,
) -> StepTime:
    """
    Args:
        held_bytes: size of the parameters that a rank updates.
    """
    compute = (
        options.step.batch_size * options.step.accum_freq / rates.images_per_second
        if rates.images_per_second is not None
        else step_flops(subject, options, gpus) / (rates.mfu * card.peak(subject.precision) * 1e12)
    )
    by_kind: dict[str, float] = {}
    hidden = 0.0
    for transfer in transfers:
        seconds = transfer.wire / (bandwidth(transfer, card, rates) * 1e9)
        by_kind[transfer.kind] = by_kind.get(transfer.kind, 0.0) + seconds
        hidden += seconds if transfer.overlapped else 0.0
    exposed = sum(by_kind.values()) - min(hidden, compute)
    update = 0.0 if options.parallel.fsdp_offload_cpu else _UPDATE_BYTES * held_bytes / (card.memory_gb_s * 1e9)
    return StepTime(compute, update, by_kind, exposed)


def bandwidth(transfer: Transfer, card: Card, rates: Rates) -> float:
    """10^9 bytes per second at which a rank of the group sends.

    Rings through several nodes use the network connections of all GPUs that the group has on a node. In an all-to-all,
    only what leaves the node passes the rank's own connection.
    """
    if transfer.collective == "copy":
        return card.host_gb_s * rates.link_efficiency
    together = min(transfer.group, max(1, rates.gpus_per_node // transfer.stride))
    if together == transfer.group:
        rate = card.link_gb_s
    elif transfer.collective == "all_to_all":
        leaving = (transfer.group - together) / (transfer.group - 1)
        rate = min(card.link_gb_s, card.network_gb_s / leaving)
    else:
        rate = min(card.link_gb_s, card.network_gb_s * together)
    return rate * rates.link_efficiency
