"""``backend_info()`` reports what was built and what runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import clipup_kernels as ck


def backend_info_in_a_fresh_process(**environment):
    code = "import json, clipup_kernels as ck; print(json.dumps(ck.backend_info()))"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )


def test_the_compiled_extension_is_what_runs():
    info = ck.backend_info()
    assert info["compiled"] and info["fallback_reason"] is None
    half = dict.fromkeys(("float32", "bfloat16", "float16"), "cpp")
    assert info["cpu"]["permute"] == half | {"float64": "torch_eager"}
    assert info["cpu"]["dispatch"] == half | {"float64": "cpp"}  # it gets indices, whatever the tokens are
    assert info["build"]["openmp"] in (True, False) and info["build"]["compiler"]
    json.dumps(info)


def test_the_extension_can_be_left_out_and_the_reason_is_reported():
    info = json.loads(backend_info_in_a_fresh_process(CLIPUP_BACKEND="torch_eager").stdout)
    assert not info["compiled"] and info["fallback_reason"] == "CLIPUP_BACKEND=torch_eager is set"
    assert set(info["cpu"]["dispatch"].values()) == {"torch_eager"} and info["forced"] == "torch_eager"


def test_an_extension_with_other_activations_is_not_used():
    code = (
        "import types, sys; sys.modules['clipup_kernels._C'] = types.SimpleNamespace(ACTIVATIONS=('gelu',))\n"
        "import clipup_kernels as ck; print(ck.backend_info()['fallback_reason'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "built from other sources" in run.stdout and "pip install" in run.stderr


def test_a_missing_extension_warns_once_and_says_how_to_fix_it():
    code = (
        "import sys; sys.modules['clipup_kernels._C'] = None\n"
        "import clipup_kernels as ck; info = ck.backend_info()\n"
        "assert not info['compiled']; print(info['fallback_reason'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("runs without its compiled extension") == 1
    assert "pip install" in run.stderr and "_C" in run.stdout


def test_sources_of_a_clone_that_were_never_built_say_that_installing_again_does_not_help(tmp_path):
    clone = tmp_path / "clone"
    (clone / "csrc").mkdir(parents=True)
    (clone / "setup.py").touch()
    shutil.copytree(
        Path(ck.__file__).parent, clone / "clipup_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = "import sys; sys.modules['clipup_kernels._C'] = None; import clipup_kernels"
    run = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=True)
    assert f"sources in {clone}" in run.stderr and "pip install --editable ." in run.stderr
    assert "again" not in run.stderr
