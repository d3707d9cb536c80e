"""Sends 200 requests from 8 clients to examples/serve.py, images and texts in turn, and prints how long they took.

python examples/serve_load.py cat.jpg [http://localhost:8000]
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from urllib.request import Request, urlopen

REQUESTS, CLIENTS = 200, 8
URL = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:8000"
BODIES = [
    ("image", Path(sys.argv[1]).read_bytes(), "image/*"),
    ("text", b'{"text": "a photograph"}', "application/json"),
]


def milliseconds(number: int) -> float:
    path, body, kind = BODIES[number % len(BODIES)]
    start = time.perf_counter()
    urlopen(Request(f"{URL}/{path}", body, {"Content-Type": kind})).read()  # an error ends the program
    return (time.perf_counter() - start) * 1e3


sys.tracebacklimit = 0  # errors, such as that of a server that is not there, in a line each
start = time.perf_counter()
with ThreadPoolExecutor(CLIENTS) as clients:
    times = list(clients.map(milliseconds, range(REQUESTS)))
print(f"{REQUESTS / (time.perf_counter() - start):.1f} requests a second, none failed")
for first, (path, *_) in enumerate(BODIES):
    fractions = quantiles(times[first :: len(BODIES)], n=20, method="inclusive")
    print(f"{path:5}  p50 {fractions[9]:.1f} ms  p95 {fractions[18]:.1f} ms")
