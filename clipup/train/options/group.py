"""What the groups of options have in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class OptionGroup:
    """Options about one thing. Its class docstring is shown above them in ``clipup train --help``."""

    def check(self) -> None:
        """Raises ValueError, naming the option, for values that are out of range or do not go together."""
