"""Runs notebooks from top to bottom and writes what they show into them.

    python examples/run_notebooks.py examples/experts.ipynb      # or: make notebooks

Needs nbclient and ipykernel (the extra test). When a cell fails, the file stays as it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=None, record_timing=False).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":  # without progress lines, which have the rates of this machine
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
