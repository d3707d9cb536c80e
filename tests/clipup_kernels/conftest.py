"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clipup_kernels.backends import extension, registry
from clipup_kernels.ops import packed_weights


def _forget_choices() -> None:
    for cached in (
        registry.function_of,
        registry.all_computed_by,
        registry._warn_without_triton,
        packed_weights.packed_layout,
    ):
        cached.cache_clear()


@pytest.fixture
def force_backend(monkeypatch) -> Callable[[str | None], None]:
    """Sets ``CLIPUP_BACKEND`` and forgets what was chosen before; without a call, nothing is forced."""

    def force(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv(extension.FORCE_BACKEND, raising=False)
        else:
            monkeypatch.setenv(extension.FORCE_BACKEND, name)
        _forget_choices()

    force(None)
    yield force
    _forget_choices()
