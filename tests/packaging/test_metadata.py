"""What pyproject.toml, setup.py and the Makefile promise."""

import re
import sys
from pathlib import Path

import pytest
import setuptools
from setuptools.config.pyprojecttoml import read_configuration

import clipup_kernels
from clipup_kernels import _version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pyproject():
    return read_configuration(ROOT / "pyproject.toml")


def run_setup():
    source = (ROOT / "setup.py").read_text()
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})


def test_one_file_says_the_version(pyproject):
    assert pyproject["project"]["version"] == _version.__version__
    for file in ["pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile"]:
        assert _version.__version__ not in (ROOT / file).read_text()


def test_the_native_module_was_built_from_this_version():
    assert clipup_kernels.backend_info()["build"]["version"] == _version.__version__


def test_all_holds_every_extra(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    assert {"demo", "train", "eval", "search", "hf", "benchmark", "bench", "test", "docs", "all"} | {
        "wandb",
        "trackio",
    } == set(extras)
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything)) == set(extras) - {"all"} | {"clipup"}


def test_the_makefile_installs_what_a_build_requires():
    # read_configuration leaves [build-system] out
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    installs = re.search(r"^BUILD_TOOLS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert {need.strip('" ') for need in requires.split(",")} == {need.strip("'") for need in installs.split()}


def test_setup_refuses_windows_by_name(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="Windows"):
        run_setup()


def test_setup_names_the_setuptools_that_it_needs(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match="needs setuptools 77 or newer to build, this is 65.5.0"):
        run_setup()
