"""What pyproject.toml and the Makefile promise."""

import re
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

import clipup_kernels
from clipup_kernels import _version

ROOT = Path(__file__).parents[2]
PROJECT = read_configuration(ROOT / "pyproject.toml")["project"]


def test_one_file_says_the_version():
    assert PROJECT["version"] == clipup_kernels.backend_info()["build"]["version"] == _version.__version__
    for file in ("pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile"):
        assert _version.__version__ not in (ROOT / file).read_text()


def test_all_holds_every_extra():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything)) == set(extras) - {"all"} | {"clipup"}


def test_the_makefile_installs_what_a_build_requires():
    # read_configuration leaves [build-system] out
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    installs = re.search(r"^BUILD_TOOLS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert {need.strip('" ') for need in requires.split(",")} == {need.strip("'") for need in installs.split()}
