"""The log of a run, as JSON lines small enough to commit. All but seconds and machine is bitwise reproducible.

{"kind": "run", ...}          the config, the data, and for an upcycled model the step-0 difference
{"kind": "train", ...}        means over a window of steps: loss, contrastive, aux; sparse also balance, z, dropped,
                              router_entropy, and load: the largest expert's over the mean, mean over layers
{"kind": "validation", ...}   ``measure.retrieval_numbers`` during training, and the experts' similarity
{"kind": "test", ...}         at the end: the same for the test splits and validation
{"kind": "layers", ...}       at the end, sparse models only: similarity, load and dropped by layer
{"kind": "cost", ...}         steps, pairs, FLOPs, parameters; seconds and machine, which differ from run to run
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipup.atomic_files import replace_files

SUFFIX = ".jsonl"
Record = dict[str, Any]
WINDOWS = 50
"""Training lines per log, whatever the number of steps; fewer if the trainer wrote fewer records."""
_MEANS = ("loss", "contrastive", "aux", "balance", "z", "dropped", "router_entropy")


def write(path: Path, records: Sequence[Record]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: lambda part: part.write_text(text, encoding="utf-8")})


def read(path: str | Path) -> list[Record]:
    """
    Raises:
        ValueError: the log ends before its cost record.
    """
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not records or records[-1].get("kind") != "cost":
        raise ValueError(f"{path} is not a complete log, which ends with a cost record: run it again")
    return records


def reproducible(records: Sequence[Record]) -> list[Record]:
    """The records without the fields that vary between repetitions."""
    return [{key: value for key, value in record.items() if key not in ("seconds", "machine")} for record in records]


def training(history: Sequence[Record], steps: int) -> Iterator[Record]:
    """The trainer's records, averaged to one record per window."""
    inside: list[Record] = []
    closed = 0
    for record in history:
        inside.append(record)
        window = record["step"] * WINDOWS // steps
        if window > closed or record is history[-1]:
            yield _window(inside)
            inside, closed = [], window


def load_ratio(layer: Record) -> float:
    """The largest expert's load over the mean load: 1 if balanced."""
    return max(layer["load"]) * len(layer["load"])


def _window(records: list[Record]) -> Record:
    line = {"kind": "train", "step": records[-1]["step"], "lr": records[-1]["lr"]}
    line |= {name: _mean([record[name] for record in records]) for name in _MEANS if name in records[0]}
    if "layers" in records[0]:
        line["load"] = _mean([load_ratio(layer) for record in records for layer in record["layers"].values()])
    return line


def _mean(values: list[float | None]) -> float | None:
    """The mean without skipped steps, whose loss may be None; None without other steps."""
    applied = [value for value in values if value is not None]
    return sum(applied) / len(applied) if applied else None
