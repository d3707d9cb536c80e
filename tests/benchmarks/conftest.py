"""Programs about Triton's kernels have tests only where Triton is installed. Fixtures of several tests."""

import importlib.util

import pytest
import torch
from PIL import Image

if importlib.util.find_spec("triton") is None:
    collect_ignore = [f"test_gpu_{name}.py" for name in ("choices", "host", "kernels", "model", "static")]


@pytest.fixture
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_pairs(tmp_path):
    """Squares with captions, as a CSV file."""

    def make(count: int) -> str:
        lines = ["filepath\ttitle"]
        for number in range(count):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
            lines.append(f"{tmp_path / f'{number}.png'}\tsquare {number}")
        pairs = tmp_path / "pairs.csv"
        pairs.write_text("\n".join(lines))
        return str(pairs)

    return make
