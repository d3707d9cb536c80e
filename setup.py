"""Asks CMake (Ninja) to build clipup_kernels/_C; CMakeLists.txt describes the native code, pyproject.toml the rest.

Environment: ``CLIPUP_CUDA`` = AUTO (default), ON or OFF says whether csrc/cuda is compiled; ``CLIPUP_NATIVE=OFF``
installs without native code, the ops then run in plain torch.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

if sys.platform == "win32":
    sys.exit("clipup does not support Windows: its native code is built and tested on Linux (x86-64, aarch64); use WSL")
if int(__version__.split(".")[0]) < 77:
    sys.exit(
        f"clipup needs setuptools 77 or newer to build, this is {__version__}: "
        "pip install --upgrade setuptools, or build without --no-build-isolation"
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = find_program("cmake")
        source = Path(__file__).parent.resolve()
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *(cmake, "-S", str(source), "-B", str(build), "-G", "Ninja"),
            "--fresh",  # an isolated build finds its tools in a directory that is gone the next time
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCLIPUP_MODULE_DIR={module.parent}",
            f"-DCLIPUP_CUDA={(os.environ.get('CLIPUP_CUDA') or 'AUTO').upper()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "clipup: the native code did not build; the reason is above. It needs g++ 11 or clang 14, Python's "
                "headers (Debian: apt install g++ python3-dev) and, with --no-build-isolation, pip install cmake ninja "
                "pybind11. CLIPUP_NATIVE=OFF installs without native code; the ops then run in plain torch."
            ) from error


def find_program(name: str) -> str:
    """The program that the Python package ``name`` of this environment brings, else the one on PATH."""
    try:
        brought = [Path(file.locate()) for file in files(name) or [] if file.name == name]
    except PackageNotFoundError:
        brought = []
    found = next((str(path) for path in brought if path.is_file() and os.access(path, os.X_OK)), shutil.which(name))
    if found is None:
        raise SystemExit(f"clipup: {name} was not found: pip install {name}, or build without --no-build-isolation")
    return found


native = os.environ.get("CLIPUP_NATIVE", "ON").upper() != "OFF"
setup(
    ext_modules=[Extension("clipup_kernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
