"""Asks CMake (Ninja) to build clipup_kernels/_C; CMakeLists.txt describes the native code, pyproject.toml the rest."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.platform == "win32":
    sys.exit("clipup does not support Windows: its native code is built and tested on Linux (x86-64, aarch64); use WSL")

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCLIPUP_MODULE_DIR={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCLIPUP_CUDA={os.environ.get('CLIPUP_CUDA', 'AUTO')}",
        ]  # fmt: skip
        # An isolated build runs in a directory that is gone the next time: what was found there must be found again.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("clipup_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
