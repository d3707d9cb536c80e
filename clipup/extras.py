"""Errors for missing optional packages, naming the extra of clipup that installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
