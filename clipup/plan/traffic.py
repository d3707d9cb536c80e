"""What a rank sends in one optimizer step, by kind.

Counts and sizes of the collectives are those of ``clipup.train``; tests compare them with runs. The bytes that a
collective sends are a model: ring algorithms, and ranks that get equally many rows in an all-to-all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import open_clip

from ..train.objectives.selection import selected
from ..train.train_options import TrainOptions
from .memory import rows_per_pair
from .subject import Subject
from .units import Unit

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast", "copy"]
_ENCODERS_ARE_CALLED = open_clip.__version__.startswith("3.")
_SHARE_SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""Sent bytes of a collective among many ranks, as a multiple of its payload."""


class Transfer(NamedTuple):
    """Collectives of one kind."""

    kind: str
    collective: Collective
    payload: float
    """Bytes a step that the collectives are called with: the whole of a gather's result, of what is reduced, and of the
    rows that a rank sends, to itself too."""
    group: int
    """Ranks in the group."""
    stride: int = 1
    """Ranks between two neighbors of the group."""
    overlapped: bool = False
    """Whether it can run beside computation."""

    @property
    def wire(self) -> float:
        """Bytes that a rank sends."""
        if self.collective not in _SHARE_SENT:
            return self.payload
        return _SHARE_SENT[self.collective] * self.payload * (self.group - 1) / self.group


def traffic(subject: Subject, options: TrainOptions, gpus: int, caption_tokens: int | None = None) -> list[Transfer]:
    """
    Args:
        options: batch_size counts pairs per rank and accumulated batch.
        caption_tokens: mean length of a caption; sparse text layers that are aware of padding route no more. None: the
            whole context.
    """
    parts = subject.units(options, gpus)
    transfers = [
        *_unit_transfers(parts, options),
        *_rows(subject, options, caption_tokens),
        *_features(subject, options, gpus),
    ]
    transfers += [*_small(subject, options, gpus, parts), *_offloaded(parts, options)]
    return [
        transfer for transfer in transfers if transfer.payload and (transfer.group > 1 or transfer.collective == "copy")
    ]


def forward_passes(options: TrainOptions) -> int:
    """Forward passes of a step. Accumulation first runs all batches without gradients."""
    return options.step.accum_freq * (1 if options.step.accum_freq == 1 else 2)


def _unit_transfers(parts: list[Unit], options: TrainOptions) -> Iterator[Transfer]:
    for unit in parts:
        if unit.kind != "unsharded":
            yield Transfer("gradients", "reduce_scatter", unit.reduced_bytes, unit.shards, unit.stride, True)
            span = unit.shards * unit.stride
            yield Transfer("gradients", "all_reduce", unit.reduced_shard_bytes, unit.replicas, span, True)
        gathered = gathers_per_step(unit, options) * unit.gathered_bytes
        yield Transfer("parameters", "all_gather", gathered, unit.shards, unit.stride, True)


def gathers_per_step(unit: Unit, options: TrainOptions) -> int:
    """A unit is gathered for each forward and each backward pass, or once for both if it stays gathered. The forward
    pass of open_clip 3 calls both encoders: what belongs to no block is gathered for each of them, or for each pass if
    it stays gathered."""
    forward, backward = forward_passes(options), options.step.accum_freq
    by_encoders = unit.kind == "root" and _ENCODERS_ARE_CALLED
    if options.parallel.fsdp_no_reshard_after_forward:
        return forward + backward if by_encoders else backward
    return (2 if by_encoders else 1) * forward + backward


def _rows(subject: Subject, options: TrainOptions, caption_tokens: int | None) -> Iterator[Transfer]:
    """Rows and gates go to the experts and results come back; gradients the other way round. With checkpointing the
    backward pass repeats the forward's exchanges."""
    if options.parallel.ep == 1:
        return
    for layer in subject.activations(options).layers:
        config = subject.sparse[layer.name]
        backward = options.step.accum_freq
        forward = forward_passes(options) + (backward if options.speed.grad_checkpointing else 0)
        rows = rows_per_pair(subject, layer) * options.step.batch_size
        if caption_tokens is not None and config.padding_aware and not layer.name.startswith("visual"):
            rows *= min(1.0, caption_tokens / layer.per_pair)
        payload = (forward + backward) * rows * (2 * layer.width * layer.bytes_each + 4)
        yield Transfer("expert rows", "all_to_all", payload, options.parallel.ep)
        counts = forward * 4 * config.num_experts
        yield Transfer("small gradients and counts", "all_to_all", counts, options.parallel.ep)


def _features(subject: Subject, options: TrainOptions, gpus: int) -> Iterator[Transfer]:
    own = options.step.batch_size * options.step.accum_freq * subject.feature(options).nbytes
    sent = selected(options.loss).traffic(options.loss, own, gpus, len(subject.trained_towers(options)))
    for collective, payload in sent.items():
        yield Transfer("features", collective, options.step.accum_freq * payload, gpus)


def _small(subject: Subject, options: TrainOptions, gpus: int, parts: list[Unit]) -> Iterator[Transfer]:
    if options.parallel.is_sharded:
        small = sum(unit.reduced_bytes for unit in parts if unit.kind == "unsharded")
        yield Transfer("small gradients and counts", "all_reduce", small, gpus)
    else:
        buffers = sum(buffer.nbytes for buffer in subject.model.buffers())
        yield Transfer("small gradients and counts", "broadcast", buffers, gpus)
    biased = sum(8 * config.num_experts for config in subject.sparse.values() if config.selection_bias != "none")
    yield Transfer("small gradients and counts", "all_reduce", biased, gpus)
    counted = [config for config in subject.sparse.values() if config.loss_scope == "global_batch"]
    once = options.step.accum_freq > 1 or not options.speed.grad_checkpointing
    size = sum(4 * (config.top_k * config.num_experts + 1) for config in counted)
    yield Transfer("small gradients and counts", "all_reduce", size * (1 if once else 2), gpus)


def _offloaded(parts: list[Unit], options: TrainOptions) -> Iterator[Transfer]:
    """Shards go to the GPU before each gather, and their gradients come back."""
    for unit in parts if options.parallel.fsdp_offload_cpu else []:
        there = gathers_per_step(unit, options) * unit.shard_bytes
        yield Transfer("host", "copy", there + unit.trained_bytes, 1, overlapped=True)
