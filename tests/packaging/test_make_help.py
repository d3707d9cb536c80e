import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def printed(*arguments):
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_alone_explains_every_target():
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    lines = printed("--silent", "help").splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(targets)
    assert all(len(line) <= 80 and len(line.split()) > 1 for line in lines)
    assert printed("--dry-run") == printed("--dry-run", "help")
