"""Late imports: public names, on first access, and optional packages, with errors that name the extra of clipup that
installs them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def needed_for(what: str, extra: str) -> Iterator[None]:
    """Wraps the import of a package that ``pip install clipup`` does not install.

    Args:
        what: what needs the package, such as "reading CSV files".
        extra: the extra of clipup that installs it.

    Raises:
        ImportError: if the package is missing. Names it and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(what, (error.name or "").partition(".")[0], extra) from error


def missing(what: str, package: str, extra: str) -> ImportError:
    return ImportError(
        f"{what} needs the package {package}, which is not installed; clipup's extra {extra!r} has it. In a clone of "
        f'clipup: pip install ".[{extra}]"'
    )


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose ``__init__.pyi`` alone lists its public names.
    ``__all__`` is without ``__version__`` and rooms.

    Args:
        package: its ``__name__``. file: its ``__file__``, beside which the ``.pyi`` is.
    """
    modules = {
        alias.name: "." * node.level + (node.module or alias.name)
        for node in ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name], package)
        return module if modules[name] == f".{name}" else getattr(module, name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *modules})

    public = [name for name, module in modules.items() if module != f".{name}" and not name.startswith("_")]
    return get, names, sorted(public)
