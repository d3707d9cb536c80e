"""Values of a plan on the CPU, for backends that index with them in torch: the same errors as the C++ kernels raise.

On other devices reading the values would make the host wait; there they are the caller's responsibility.
"""

from __future__ import annotations

from torch import Tensor


def check_offsets(offsets: Tensor, num_rows: int) -> None:
    """Raises ValueError unless ``offsets`` [E + 1] starts with 0, ascends, and ends at ``num_rows`` or before."""
    if offsets.device.type == "cpu":
        _check_range("offsets", offsets, 0, num_rows)
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets: expected ascending values from 0 on, got {offsets.tolist()}")


def check_choices(choice_of_row: Tensor, offsets: Tensor) -> None:
    """``check_offsets``; and ValueError unless every row of an expert has one of the R choices."""
    if choice_of_row.device.type == "cpu":
        num_rows = choice_of_row.numel()
        check_offsets(offsets, num_rows)
        _check_range("choice_of_row", choice_of_row[: int(offsets[-1])], 0, num_rows - 1)


def check_rows(row_of_choice: Tensor, num_rows: int) -> None:
    """Raises ValueError unless every entry is a row, or -1 for a choice without one."""
    if row_of_choice.device.type == "cpu":
        _check_range("row_of_choice", row_of_choice.flatten(), -1, num_rows - 1)


def _check_range(name: str, values: Tensor, lowest: int, highest: int) -> None:
    outside = ((values < lowest) | (values > highest)).nonzero()
    if len(outside):
        position = int(outside[0])
        raise ValueError(
            f"{name}: expected values from {lowest} to {highest}, got {int(values[position])} at position {position}"
        )
