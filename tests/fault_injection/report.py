"""The figures of a campaign, as a table of Markdown and as JSON."""

from __future__ import annotations

import argparse
import json

from campaign import Tally


def as_table(tally: Tally, options: argparse.Namespace, seconds: float) -> str:
    rows = ["| fault | times | endings | failures |", "|---|---:|---|---:|"]
    for kind, times in sorted(tally.faults.items()):
        endings = ", ".join(f"{ending} {count}" for ending, count in tally.endings.get(kind, {}).items())
        rows.append(f"| {kind} | {times} | {endings} | {tally.failures[kind]} |")
    return "\n".join([*rows, "", _sentence(tally, options, seconds)])


def _sentence(tally: Tally, options: argparse.Namespace, seconds: float) -> str:
    return (
        f"{options.processes} processes, seed {options.seed}: {tally.faults.total()} faults on {tally.runs} runs that "
        f"ended well, {tally.starts} starts of which {tally.resumes} went on from a checkpoint; {tally.recomputed} "
        f"steps computed again, at most {tally.most_recomputed} after a fault without damage; {tally.half_written} "
        f"half-written files seen; {tally.missed.total()} faults came too late; {tally.failures.total()} failures; "
        f"{seconds:.0f} s"
    )


def as_json(tally: Tally, options: argparse.Namespace, seconds: float) -> str:
    return (
        json.dumps(
            {
                "processes": options.processes,
                "seed": options.seed,
                "seconds": round(seconds),
                "runs": tally.runs,
                "starts": tally.starts,
                "resumes": tally.resumes,
                "steps_recomputed": tally.recomputed,
                "most_steps_recomputed_after_a_fault": tally.most_recomputed,
                "half_written_files_seen": tally.half_written,
                "faults_too_late": tally.missed.total(),
                "faults": {
                    kind: {
                        "times": times,
                        "endings": dict(tally.endings.get(kind, {})),
                        "failures": tally.failures[kind],
                    }
                    for kind, times in sorted(tally.faults.items())
                },
                "failures": tally.failures.total(),
            },
            indent=2,
        )
        + "\n"
    )
