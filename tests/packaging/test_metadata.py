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


def test_all_holds_every_extra_but_other_engines():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything)) == set(extras) - {"all", "engines"} | {"clipup"}
