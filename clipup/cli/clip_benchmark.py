"""``clipup clip-benchmark``: CLIP_benchmark's command line with the models of clipup."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from ..evaluate import clip_benchmark

    return clip_benchmark.run(argv)
