"""Programs about Triton's kernels have tests only where Triton is installed."""

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore = [f"test_gpu_{name}.py" for name in ("choices", "host", "kernels", "model", "static")]
