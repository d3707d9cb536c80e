"""sdist and wheel, as someone who downloads them would meet them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from documents import ROOT, blocks

NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", ".*cache", ".hypothesis", "build", "dist", "runs", "logs", "*.so")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel made from the sdist, with the tools of this environment (no network)."""
    source, out = tmp_path_factory.mktemp("source") / "clipup", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True, env={**os.environ, "CLIPUP_CUDA": "OFF"})
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_sdist_and_wheel_hold_the_sources_and_the_licence(distributions):
    with tarfile.open(distributions[0]) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    wheel = set(zipfile.ZipFile(distributions[1]).namelist())
    sources = [(source, folder, "*.[ch]*") for folder in ("csrc", "tests", "benchmarks", "examples")]
    for names, folder, files in (*sources, (wheel, "clipup", "*"), (wheel, "clipup_kernels", "*")):
        for path in (ROOT / folder).rglob(files):
            if path.is_file() and path.suffix not in {".pyc", ".so"} and "cache" not in str(path.parent):
                assert path.relative_to(ROOT).as_posix() in names
    assert {"CMakeLists.txt", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py"} <= source
    assert not [name for name in source if name.endswith((".so", ".pyc"))]
    assert any(name.startswith("clipup_kernels/_C.") for name in wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"clipup", "clipup_kernels"}


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(distributions, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(distributions[1])]
    subprocess.run(install, check=True)

    # torch and the others come from here; the path file of an editable install is not read along.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    script = (
        "import clipup_kernels as ck; info = ck.backend_info(); print(ck.__file__, info['compiled'], info['build'])"
    )
    run = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    output = subprocess.run([str(python), "-c", script], **run).stdout
    assert output.startswith(str(tmp_path / "venv")) and " True " in output and "'cuda': False" in output
    help_text = subprocess.run([str(python.with_name("clipup")), "--help"], **run).stdout
    assert "upcycle" in help_text


@pytest.mark.slow
def test_type_checkers_find_an_editable_install_and_no_error_in_the_example_of_readme(tmp_path):
    source, environment = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python, (packages,) = environment / "bin" / "python", environment.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_path("purelib"))  # pip, the tools of the build, mypy and torch
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."]
    subprocess.run(install, cwd=source, check=True, env={**os.environ, "CLIPUP_NATIVE": "OFF"})

    (tmp_path / "example.py").write_text("".join(block.text for block in blocks(ROOT / "README.md", "python")))
    check = [str(python), "-m", "mypy", "--strict", "--allow-untyped-calls", "example.py"]  # torch's backward is one
    checked = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout.startswith("Success"), checked.stdout + checked.stderr
