"""Packages that only some commands need, and the extras of clipup that install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_for(what: str, extra: str) -> Iterator[None]:
    """Around the import of a package that a plain ``pip install clipup`` leaves out.

    Args:
        what: cannot be done without the package, "reading CSV files".
        extra: of clipup, which installs it.

    Raises:
        ImportError: naming the package and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(what, (error.name or "").partition(".")[0], extra) from error


def missing(what: str, package: str, extra: str) -> ImportError:
    return ImportError(f'{what} needs the package {package}, which is not installed: pip install "clipup[{extra}]"')
