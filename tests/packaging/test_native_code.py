"""What holds for csrc/ and for the module that is built from it."""

import re
import subprocess
import sys
from pathlib import Path

from platforms import linux_only

from clipup_kernels import _C

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def test_only_the_bindings_have_heard_of_python():
    for path in SOURCES:
        includes = re.findall(r"#include *[<\"]([^>\"]+)", path.read_text())
        knows_python = any(re.match(r"pybind11|Python\.h|torch|ATen|c10", name) for name in includes)
        assert knows_python == (path.name == "bindings.cpp"), path


def test_the_module_is_linked_to_no_openmp_runtime():
    assert b"omp.so" not in Path(_C.__file__).read_bytes()


@linux_only
def test_native_ops_run_on_as_many_threads_as_torch_is_given():
    # A runtime of its own would start its threads at the first large call.
    script = """
import os, torch
from clipup_kernels import _C
torch.set_num_threads(1)
rows, width = 20000, 256
x, y = torch.randn(rows, width), torch.empty(rows, width)
choices, used = torch.arange(rows, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32)
before = set(os.listdir("/proc/self/task"))
_C.permute(x.data_ptr(), 4 * width, choices.data_ptr(), used.data_ptr(), rows, 1, y.data_ptr())
assert torch.equal(x, y)
print(len(set(os.listdir("/proc/self/task")) - before), "new threads")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "0 new threads\n"
