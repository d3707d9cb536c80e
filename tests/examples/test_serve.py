"""The server of embeddings answers with those of its model."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_layouts import picture
from tiny_clip import save_with_words

import clipup
import clipup_kernels

PATH = Path(__file__).parents[2] / "examples" / "serve.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("fastapi")
    import serve

    return serve


@pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="int8 needs the C++ extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_concurrent_requests_get_the_embeddings_of_the_model(dtype, example, tmp_path):
    from fastapi.testclient import TestClient

    model, config = save_with_words(tmp_path / "plain")
    fast = clipup.accelerate(model.to(dtype), weights="int8")
    clipup.save_pretrained(fast, tmp_path / "int8", config, tokenizer_directory=f"local-dir:{tmp_path / 'plain'}")
    pictures = [picture(seed).resize((16, 16)) for seed in range(12)]  # the size of the model's input
    words = ["red", "green blue"] * 6

    def ask(number):
        file = BytesIO()
        pictures[number].save(file, "PNG")
        answers = client.post("/image", content=file.getvalue()), client.post("/text", json={"text": words[number]})
        return [answer.raise_for_status().json()["embedding"] for answer in answers]

    with TestClient(example.create_app(str(tmp_path / "int8"))) as client:
        with ThreadPoolExecutor(8) as clients:
            images, texts = map(torch.tensor, zip(*clients.map(ask, range(12)), strict=True))
        assert client.post("/image", content=b"no image").status_code == 400
        assert client.post("/text", json={"text": None}).status_code == 422
    preprocess = clipup.create_model_and_transforms(str(tmp_path / "int8"))[2]
    with torch.no_grad():
        expected = fast.encode_image(torch.stack([preprocess(image).to(dtype) for image in pictures]), normalize=True)
        torch.testing.assert_close(images.to(dtype), expected)
        tokens = clipup.get_tokenizer(str(tmp_path / "int8"))(words)
        torch.testing.assert_close(texts.to(dtype), fast.encode_text(tokens, normalize=True))


def test_inputs_that_wait_are_encoded_together_and_an_error_reaches_all_of_them(example):
    async def ask(encode):
        runs = []
        batches = example.Batches(encode, SimpleNamespace(submit=runs.append))
        answers = [asyncio.create_task(batches.embedding(torch.tensor([float(row)]))) for row in range(20)]
        await asyncio.sleep(0)  # all wait now
        for run in runs:
            run()
        return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), timeout=60)

    answers = asyncio.run(ask(lambda rows, normalize: torch.full((len(rows), 1), len(rows))))
    assert answers == [[16]] * 16 + [[4]] * 4
    answers = asyncio.run(ask(lambda rows, normalize: rows / 0 if len(rows) < 16 else rows.missing))
    assert [type(answer) for answer in answers] == [AttributeError] * 16 + [list] * 4


def test_the_load_says_in_lines_without_a_traceback_that_no_server_is_there():
    command = f"{sys.executable} {PATH.with_name('serve_load.py')} {PATH} http://localhost:9"
    said = subprocess.run(command.split(), capture_output=True, text=True).stderr
    assert "refused" in said and "Traceback" not in said
