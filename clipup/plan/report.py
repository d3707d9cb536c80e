"""A plan as text and as JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from .plan import Cluster, Plan

_HOW = {
    "exact": "as a run holds it",
    "counted": "what autograd saves, counted on a copy without memory",
    "model": "a model, not measured",
}


class Length(NamedTuple):
    """How long a run is."""

    steps: int
    samples: int
    """Image-text pairs."""


def as_json(plan: Plan, cluster: Cluster, length: Length | None) -> dict[str, Any]:
    """Bytes, seconds and FLOPs of a GPU and step; hours and price of a run."""
    return {
        "setting": plan.setting(),
        "flags": plan.flags(),
        "fits": plan.fits,
        "memory": {
            "needed_bytes": plan.memory.bytes,
            "available_bytes": cluster.card.memory_gb * 1e9,
            "host_bytes": plan.memory.host_bytes,
            "parts": [part._asdict() for part in plan.memory.parts],
        },
        "traffic": [{**transfer._asdict(), "wire": transfer.wire} for transfer in plan.traffic],
        "time": {**plan.time._asdict(), "total": plan.time.total, "limit": plan.time.limit},
        "flops": plan.flops,
        "run": None if length is None else {**length._asdict(), **_run(plan, cluster, length)},
    }


def as_text(plan: Plan, cluster: Cluster, length: Length | None) -> str:
    """Tables for a terminal."""
    return "\n".join(
        [*_memory(plan, cluster), "", *_traffic(plan), "", *_time(plan, cluster), *_length(plan, cluster, length)]
    )


def summary(plan: Plan, cluster: Cluster) -> str:
    """One line for a proposal."""
    memory = f"{_gb(plan.memory.bytes)} of {cluster.card.memory_gb:g} GB on a GPU"
    return f"{plan.flags()}: {memory}, {_gb(plan.wire)} sent and {_seconds(plan.time.total)} in a step"


def _memory(plan: Plan, cluster: Cluster) -> list[str]:
    lines = ["memory of a GPU"]
    lines += [_row(part.name, _gb(part.bytes), _HOW[part.how]) for part in plan.memory.parts]
    verdict = "fits" if plan.fits else "does NOT fit"
    total = f"{verdict} into {cluster.card.memory_gb:g} GB; at most, as if all parts were at their fullest at once"
    lines.append(_row("sum", _gb(plan.memory.bytes), total))
    if not plan.fits:
        largest = max(plan.memory.parts, key=lambda part: part.bytes)
        lines.append(f"  the largest part is: {largest.name}")
    if plan.memory.host_bytes:
        lines.append(_row("in the host's memory", _gb(plan.memory.host_bytes), _HOW["exact"]))
    return lines


def _traffic(plan: Plan) -> list[str]:
    lines = ["traffic of a step and rank (payload: what the collectives are called with; sent: a model)"]
    lines.append(f"  {'':<20}{'payload':>12}{'sent':>12}{'time':>12}")
    for kind, seconds in plan.time.by_kind.items():
        transfers = [transfer for transfer in plan.traffic if transfer.kind == kind]
        payload, wire = (
            sum(values) for values in zip(*((transfer.payload, transfer.wire) for transfer in transfers), strict=True)
        )
        beside = "beside computation" if all(transfer.overlapped for transfer in transfers) else "waited for"
        lines.append(f"  {kind:<20}{_gb(payload):>12}{_gb(wire):>12}{_seconds(seconds):>12}  {beside}")
    return lines if plan.traffic else [lines[0], "  none"]


def _time(plan: Plan, cluster: Cluster) -> list[str]:
    time, rates = plan.time, cluster.rates
    peak = cluster.card.peak(plan.options.precision_on("cuda"))
    pace = (
        f"at {rates.mfu:.0%} of {peak:g} TFLOP/s"
        if rates.images_per_second is None
        else f"at {rates.images_per_second:g} pairs per second and GPU, as given"
    )
    pairs = plan.options.step.batch_size * plan.options.step.accum_freq * cluster.gpus
    return [
        "time of a step (a model)",
        _row("computation", _seconds(time.compute), f"{plan.flops / 1e12:.1f} TFLOP a GPU {pace}"),
        _row("waiting for traffic", _seconds(time.exposed), f"links at {rates.link_efficiency:.0%} of their rate"),
        _row("optimizer", _seconds(time.update), "reading and writing its state once"),
        _row("sum", _seconds(time.total), f"{pairs / time.total:,.0f} pairs per second; {time.limit} takes most of it"),
    ]


def _length(plan: Plan, cluster: Cluster, length: Length | None) -> list[str]:
    if length is None:
        return []
    run = _run(plan, cluster, length)
    price = "" if run["price"] is None else f", {_count(run['price'])} at {cluster.price:g} a GPU and hour"
    return [
        "",
        f"run of {length.samples:,} pairs, {length.steps:,} steps: {_count(run['hours'], 1)} hours, "
        f"{_count(run['gpu_hours'])} GPU hours{price}",
    ]


def _count(value: float, digits: int = 0) -> str:
    """With this many decimals, or two significant digits if these would be zeros."""
    return f"{value:,.{digits}f}" if value >= 10 ** (1 - digits) or value == 0 else f"{value:.2g}"


def _run(plan: Plan, cluster: Cluster, length: Length) -> dict[str, Any]:
    hours = length.steps * plan.time.total / 3600
    price = None if cluster.price is None else hours * cluster.gpus * cluster.price
    return {"hours": hours, "gpu_hours": hours * cluster.gpus, "price": price}


def _row(name: str, value: str, note: str) -> str:
    return f"  {name:<36}{value:>10}  {note}"


def _gb(count: float) -> str:
    """10^9 bytes, or smaller units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
