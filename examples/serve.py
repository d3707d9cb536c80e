"""Serves the embeddings of a CLIP on a CPU, preferably in int8. Requests that wait are encoded together.

    pip install fastapi uvicorn
    MODEL=clip-int8 uvicorn --app-dir examples --factory serve:create_app

    curl --data-binary @cat.jpg localhost:8000/image                                        # {"embedding": [...]}
    curl --header 'Content-Type: application/json' --data '{"text": "a cat"}' localhost:8000/text

MODEL is a directory (``clipup convert --int8 SOURCE DIR``) or a name; CORES (default: all) and OMP_NUM_THREADS (1) say
how many batches are computed at a time, and by how many cores each: docs/serving.md. examples/serve_load.py sends
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Annotated

import torch
from fastapi import Body, FastAPI, HTTPException
from torch import Tensor

import clipup
from clipup.data.images import load_image, resize_of, upright

LARGEST_BATCH = 16


class Batches:
    """Encodes inputs that wait together. A thread takes what waits when it is free, and does not wait for more."""

    def __init__(self, encode: Callable[..., Tensor], threads: Executor) -> None:
        self.encode, self.threads = encode, threads
        self.waiting: deque[tuple[Tensor, Future[list[float]]]] = deque()

    async def embedding(self, row: Tensor) -> list[float]:
        """The embedding of an input, with length 1."""
        future: Future[list[float]] = Future()
        self.waiting.append((row, future))
        self.threads.submit(self._run)  # finds nothing if an earlier batch has taken the input
        return await asyncio.wrap_future(future)

    @torch.inference_mode()
    def _run(self) -> None:
        batch = []
        with contextlib.suppress(IndexError):  # no more inputs
            while len(batch) < LARGEST_BATCH:
                batch.append(self.waiting.popleft())
        batch = [(row, future) for row, future in batch if future.set_running_or_notify_cancel()]
        try:
            features = self.encode(torch.stack([row for row, _ in batch]), normalize=True).tolist() if batch else []
            for (_, future), feature in zip(batch, features, strict=True):
                future.set_result(feature)
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)


def create_app(name: str | None = None) -> FastAPI:
    """The application, with the model of a directory or a name; by default that of MODEL."""
    name = name or os.environ["MODEL"]
    model, _, preprocess = clipup.create_model_and_transforms(name)
    tokenizer, resize, dtype = clipup.get_tokenizer(name), resize_of(preprocess), next(model.parameters()).dtype
    each = int(os.environ.get("OMP_NUM_THREADS", 1))
    cores = int(os.environ.get("CORES", os.cpu_count() or 1))
    threads = ThreadPoolExecutor(max(cores // each, 1), initializer=torch.set_num_threads, initargs=(each,))
    images, texts = Batches(model.encode_image, threads), Batches(model.encode_text, threads)

    def read(content: bytes) -> Tensor:
        image = upright(load_image(content, resize=resize))  # JPEGs are decoded at a reduced scale
        return preprocess(image).to(dtype)

    app = FastAPI()

    @app.post("/image")
    async def image(content: Annotated[bytes, Body(media_type="image/*")]) -> dict[str, list[float]]:
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(threads, read, content)
        except Exception as error:  # Pillow has no common class for what a broken file may raise
            raise HTTPException(400, f"the body is not a readable image: {error}") from error
        return {"embedding": await images.embedding(pixels)}

    @app.post("/text")
    async def text(text: Annotated[str, Body(embed=True, max_length=1000)]) -> dict[str, list[float]]:
        return {"embedding": await texts.embedding(tokenizer([text])[0])}

    return app
