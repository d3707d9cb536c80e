"""Sends requests to examples/serve.py, and prints how long they took.

python examples/serve_load.py cat.jpg                # 200 requests from 8 clients, images and texts in turn
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from urllib.request import Request, urlopen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--url", default="http://localhost:8000", help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    content = args.image.read_bytes()

    def ask(number: int) -> tuple[str, float]:
        path, body, kind = ("image", content, "image/*") if number % 2 else (
            "text", json.dumps({"text": f"photograph {number}"}).encode(), "application/json"
        )  # fmt: skip
        start = time.perf_counter()
        with urlopen(
            Request(f"{args.url}/{path}", body, {"Content-Type": kind})
        ) as answer:  # an error ends the program
            json.load(answer)["embedding"]
        return path, (time.perf_counter() - start) * 1e3

    start = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as clients:
        answers = list(clients.map(ask, range(args.requests)))
    print(f"{args.requests / (time.perf_counter() - start):.1f} requests a second, none failed")
    for path in ("image", "text"):
        times = quantiles([taken for of, taken in answers if of == path], n=20, method="inclusive")
        print(f"{path:5}  p50 {times[9]:.1f} ms  p95 {times[18]:.1f} ms")


if __name__ == "__main__":
    main()
