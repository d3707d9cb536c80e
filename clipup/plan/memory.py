"""Memory of one GPU in training, by part."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..train.objectives.selection import selected
from ..train.train_options import TrainOptions
from .activations import LayerTokens
from .subject import Subject
from .units import Unit

How = Literal["exact", "counted", "model"]
"""exact: equals what a run holds. counted: what autograd saves, within the tolerance of docs/plan.md. model: a formula
that no run here has been held to."""


class Part(NamedTuple):
    """A part of a GPU's memory."""

    name: str
    bytes: float
    how: How


class Memory(NamedTuple):
    """Memory of rank 0's GPU, which holds most."""

    parts: tuple[Part, ...]
    """The most of each part at any time. Gradients grow while activations are freed, so the sum is an upper bound."""
    host_bytes: float
    """Held in the host's memory, with fsdp_offload_cpu."""

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


def memory(subject: Subject, options: TrainOptions, gpus: int, reserve: float = 0.1) -> Memory:
    """
    Args:
        options: batch_size counts pairs per rank and accumulated batch.
        reserve: share of all parts that the allocator's fragmentation, the CUDA context and NCCL need on top.
    """
    parts = subject.units(options, gpus)
    states = [
        Part("parameters", sum(unit.shard_bytes for unit in parts), "exact"),
        Part("gradients", sum(unit.trained_bytes for unit in parts), "exact"),
        Part("optimizer (AdamW)", optimizer_bytes(parts), "exact"),
    ]
    host = sum(part.bytes for part in states) if options.parallel.fsdp_offload_cpu else 0.0
    held_parts = [] if options.parallel.fsdp_offload_cpu else states
    if not options.parallel.is_sharded and gpus > 1:
        held_parts.append(Part("gradient buckets of DDP", states[1].bytes, "model"))
    if options.parallel.is_sharded:
        held_parts.append(Part("gathered parameters (FSDP)", _gathered(parts, options), "model"))
        if options.step.accum_freq > 1:
            # Without reduction, FSDP2 keeps the gradients of all parameters that it gathers, in float32.
            whole = sum(4 * parameter.numel for unit in parts if unit.fsdp for parameter in unit.trained)
            held_parts.append(Part("whole gradients while accumulating", whole, "model"))
    held_parts += _batch_parts(subject, options, gpus)
    held_parts = [part for part in held_parts if part.bytes]
    total = sum(part.bytes for part in held_parts)
    return Memory((*held_parts, Part(f"allocator's reserve ({reserve:.0%})", reserve * total, "model")), host)


def optimizer_bytes(parts: list[Unit]) -> int:
    """AdamW's two moments in the parameters' types, and a float32 count of steps for each parameter."""
    return sum(2 * unit.trained_bytes + 4 * len(unit.trained) for unit in parts)


def _gathered(parts: list[Unit], options: TrainOptions) -> float:
    """The parameters that are whole at a time: those outside of blocks, a block, and the next one, which is gathered
    ahead. A block's gradients are as large as the block; the buffer of a gather too, and that of a reduction is in
    float32."""
    gathered, reduced = _largest_block(parts)
    while_computing = gathered + max(gathered, reduced)
    if options.parallel.fsdp_no_reshard_after_forward:
        return sum(unit.gathered_bytes for unit in parts if unit.fsdp) + while_computing
    root = sum(unit.gathered_bytes for unit in parts if unit.kind == "root")
    return root + 2 * gathered + while_computing


def _largest_block(parts: list[Unit]) -> tuple[float, float]:
    """Bytes of the largest block's gathered parameters and of its gradients before they are reduced, its sparse layer
    included."""
    largest: dict[str, Unit] = {}
    for unit in parts:
        if unit.fsdp and unit.kind != "root":
            largest[unit.kind] = max(largest.get(unit.kind, unit), unit, key=lambda unit: unit.reduced_bytes)
    return sum(unit.gathered_bytes for unit in largest.values()), sum(unit.reduced_bytes for unit in largest.values())


def _batch_parts(subject: Subject, options: TrainOptions, gpus: int) -> list[Part]:
    activations, pairs = subject.activations(options), options.step.batch_size
    again = options.speed.grad_checkpointing
    copies = activations.fixed
    if again:  # expert copies exist for one layer at a time
        copies += max(activations.expert_copies, default=0) - sum(activations.expert_copies)
    name = "weights in autocast's type" if subject.precision in ("amp", "amp_bf16") else "saved once a batch"
    result = [
        Part("inputs", subject.input_bytes * pairs * options.step.accum_freq, "exact"),
        Part(name, copies, "counted"),
        Part("activations", (activations.checkpointed_per_pair if again else activations.per_pair) * pairs, "counted"),
    ]
    if again:
        result.append(Part("recomputed activations of a block", activations.largest_block_per_pair * pairs, "counted"))
    if options.parallel.ep > 1:
        result.append(Part("expert-parallel rows", expert_parallel_bytes(subject, options), "model"))
    result.append(Part("working memory of the backward pass", activations.largest_block_per_pair * pairs, "model"))
    return [*result, *_loss_parts(subject, options, gpus)]


def expert_parallel_bytes(subject: Subject, options: TrainOptions) -> float:
    """Each sparse layer also keeps the rows that its experts received and the results that came back, with gates and
    places, if ranks receive equally many; while they travel, both ends have a buffer."""
    sizes = [
        rows_per_pair(subject, layer) * options.step.batch_size * (2 * layer.width * layer.bytes_each + 16)
        for layer in subject.activations(options).layers
    ]
    return (max(sizes) if options.speed.grad_checkpointing else sum(sizes)) + max(sizes)


def rows_per_pair(subject: Subject, layer: LayerTokens) -> float:
    """Rows of a layer's experts for an image or a text: K for each token, fewer where a capacity drops some."""
    config = subject.sparse[layer.name]
    if config.experts_choose:
        return layer.per_pair * min(config.top_k * config.expert_choice_factor(training=True), config.num_experts)
    return layer.per_pair * config.top_k * min(1.0, config.capacity_factor or 1.0)


def _loss_parts(subject: Subject, options: TrainOptions, gpus: int) -> list[Part]:
    own = options.step.batch_size * options.step.accum_freq
    kept, working = selected(options.loss).memory(options.loss, own, own * gpus, subject.precision)
    return [
        Part("features of all ranks", 4 * own * gpus * subject.feature(options).nbytes, "model"),
        Part("logits", kept, "counted"),
        Part("working memory of the loss", working, "model"),
    ]
