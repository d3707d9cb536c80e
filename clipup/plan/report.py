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


def as_json(made: Plan, cluster: Cluster, length: Length | None) -> dict[str, Any]:
    """Bytes, seconds and FLOPs of a GPU and step; hours and price of a run."""
    return {
        "setting": made.setting(),
        "flags": made.flags(),
        "fits": made.fits,
        "memory": {
            "needed_bytes": made.memory.bytes,
            "available_bytes": cluster.card.memory_gb * 1e9,
            "host_bytes": made.memory.host_bytes,
            "parts": [part._asdict() for part in made.memory.parts],
        },
        "traffic": [{**transfer._asdict(), "wire": transfer.wire} for transfer in made.traffic],
        "time": {**made.time._asdict(), "total": made.time.total, "limit": made.time.limit},
        "flops": made.flops,
        "run": None if length is None else {**length._asdict(), **_run(made, cluster, length)},
    }


def as_text(made: Plan, cluster: Cluster, length: Length | None) -> str:
    """Tables for a terminal."""
    return "\n".join(
        [*_memory(made, cluster), "", *_traffic(made), "", *_time(made, cluster), *_length(made, cluster, length)]
    )


def summary(made: Plan, cluster: Cluster) -> str:
    """One line for a proposal."""
    memory = f"{_gb(made.memory.bytes)} of {cluster.card.memory_gb:g} GB on a GPU"
    return f"{made.flags()}: {memory}, {_gb(made.wire)} sent and {_seconds(made.time.total)} in a step"


def _memory(made: Plan, cluster: Cluster) -> list[str]:
    lines = ["memory of a GPU"]
    lines += [_row(part.name, _gb(part.bytes), _HOW[part.how]) for part in made.memory.parts]
    verdict = "fits" if made.fits else "does NOT fit"
    total = f"{verdict} into {cluster.card.memory_gb:g} GB; at most, as if all parts were at their fullest at once"
    lines.append(_row("sum", _gb(made.memory.bytes), total))
    if not made.fits:
        largest = max(made.memory.parts, key=lambda part: part.bytes)
        lines.append(f"  the largest part is: {largest.name}")
    if made.memory.host_bytes:
        lines.append(_row("in the host's memory", _gb(made.memory.host_bytes), _HOW["exact"]))
    return lines


def _traffic(made: Plan) -> list[str]:
    lines = ["traffic of a step and rank (payload: what the collectives are called with; sent: a model)"]
    lines.append(f"  {'':<20}{'payload':>12}{'sent':>12}{'time':>12}")
    for kind, seconds in made.time.by_kind.items():
        transfers = [one for one in made.traffic if one.kind == kind]
        payload, wire = (sum(values) for values in zip(*((one.payload, one.wire) for one in transfers), strict=True))
        beside = "beside computation" if all(one.overlapped for one in transfers) else "waited for"
        lines.append(f"  {kind:<20}{_gb(payload):>12}{_gb(wire):>12}{_seconds(seconds):>12}  {beside}")
    return lines if made.traffic else [lines[0], "  none"]


def _time(made: Plan, cluster: Cluster) -> list[str]:
    time, rates = made.time, cluster.rates
    peak = cluster.card.peak(made.options.precision_on("cuda"))
    pace = (
        f"at {rates.mfu:.0%} of {peak:g} TFLOP/s"
        if rates.images_per_second is None
        else f"at {rates.images_per_second:g} pairs per second and GPU, as given"
    )
    pairs = made.options.batch_size * made.options.accum_freq * cluster.gpus
    return [
        "time of a step (a model)",
        _row("computation", _seconds(time.compute), f"{made.flops / 1e12:.1f} TFLOP a GPU {pace}"),
        _row("waiting for traffic", _seconds(time.exposed), f"links at {rates.link_efficiency:.0%} of their rate"),
        _row("optimizer", _seconds(time.update), "reading and writing its state once"),
        _row("sum", _seconds(time.total), f"{pairs / time.total:,.0f} pairs per second; {time.limit} takes most of it"),
    ]


def _length(made: Plan, cluster: Cluster, length: Length | None) -> list[str]:
    if length is None:
        return []
    run = _run(made, cluster, length)
    price = "" if run["price"] is None else f", {_count(run['price'])} at {cluster.price:g} a GPU and hour"
    return [
        "",
        f"run of {length.samples:,} pairs, {length.steps:,} steps: {_count(run['hours'], 1)} hours, "
        f"{_count(run['gpu_hours'])} GPU hours{price}",
    ]


def _count(value: float, digits: int = 0) -> str:
    """With so many digits after the point; two that tell something where those would be zeros."""
    return f"{value:,.{digits}f}" if value >= 10 ** (1 - digits) or value == 0 else f"{value:.2g}"


def _run(made: Plan, cluster: Cluster, length: Length) -> dict[str, Any]:
    hours = length.steps * made.time.total / 3600
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
