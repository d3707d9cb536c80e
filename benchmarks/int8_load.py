"""What a saved int8 model saves, beside float32 weights and ``accelerate``: size on disk, loading time, peak memory.

    python benchmarks/int8_load.py          # dense B/16, CLIP-UP B/16, transformers' CLIPModel

Each way loads in a process of its own, in turn with the other one; the files are in the page cache. Time and memory
count from after the imports until the model is ready. Memory is the largest sum of anonymous pages; what the process
reads through a mapping of the file is not among them. Weights are random.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
from clip_throughput import BASELINE
from harness import built_from, number, on_device, run
from transformers import CLIPConfig, CLIPModel

import clipup
from clipup.models.factory import create_model_and_transforms, expecting_random_weights

TRANSFORMERS = "transformers CLIPModel"
MODELS = (BASELINE, f"{BASELINE} CLIP-UP", TRANSFORMERS)
FORMS = ("float32, then accelerate", "saved int8")


def save(name: str, directories: tuple[Path, Path]) -> None:
    """A model as it is, and in int8."""
    if name == TRANSFORMERS:
        model: Any = CLIPModel(CLIPConfig()).eval()
        write = type(model).save_pretrained
    else:
        with expecting_random_weights():
            model = create_model_and_transforms(name.split()[0], load_weights=False)[0].eval()
        if "CLIP-UP" in name:
            model = clipup.upcycle(model, clipup.MoEConfig.clip_up(), inplace=True)
        write = partial(clipup.save_pretrained, model_cfg=clipup.get_model_config(name.split()[0]))
    write(model, directories[0])
    write(clipup.accelerate(model, inplace=True, weights="int8"), directories[1])


def load(name: str, form: str, directory: Path, threads: int) -> tuple[float, float]:
    """Seconds and MiB of anonymous memory."""
    torch.set_num_threads(threads)
    before, done = anonymous(), threading.Event()
    sizes: list[float] = []

    def watch() -> None:
        while not done.is_set():
            sizes.append(anonymous())
            sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    start = perf_counter()
    model: Any = (
        CLIPModel.from_pretrained(directory)
        if name == TRANSFORMERS
        else create_model_and_transforms(str(directory))[0].eval()
    )
    if form != FORMS[1]:
        clipup.accelerate(model, inplace=True, weights="int8")
    seconds = perf_counter() - start
    done.set()
    watching.join()
    return seconds, max(sizes) - before


def anonymous() -> float:
    """MiB of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def in_own_process(call: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call).result()


def measure(args: argparse.Namespace) -> Iterator[dict]:
    for name in args.models:
        with tempfile.TemporaryDirectory() as root:
            directories = Path(root) / "exact", Path(root) / "int8"
            save(name, directories)
            calls = [partial(load, name, *case, args.threads) for case in zip(FORMS, directories, strict=True)]
            rounds = [[in_own_process(call) for call in calls] for _ in range(args.rounds)]
            for index, (form, directory) in enumerate(zip(FORMS, directories, strict=True)):
                size = sum(file.stat().st_size for file in directory.rglob("*.safetensors")) / 2**20
                seconds, peaks = zip(*(of_round[index] for of_round in rounds), strict=True)
                ratio = median(of_round[index][0] / of_round[0][0] for of_round in rounds)
                yield {
                    **on_device(args, "fp32"), "model": name, "form": form, "file_mib": f"{size:.0f}",
                    "seconds": f"{median(seconds):.2f}", "ratio": f"{ratio:.2f}",
                    "peak_mib": f"{max(peaks):.0f}", "peak_to_file": f"{max(peaks) / size:.2f}", **built_from(),
                }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = {
        "--models": {"nargs": "+", "choices": MODELS, "default": list(MODELS)},
        "--threads": number(torch.get_num_threads(), "CPU threads"),
        "--rounds": number(5, "loads of each"),
    }
    note = "ratios are medians of pair-by-pair ratios of time, to the first form"
    return run(argv, __doc__, options, measure, "model form file_mib seconds ratio peak_mib peak_to_file", note)


if __name__ == "__main__":
    raise SystemExit(main())
