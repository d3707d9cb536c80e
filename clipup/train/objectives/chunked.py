"""Contrastive losses in chunks of rows, so that no rank has all logits of a global batch in memory.

With 512 pairs on each of 64 ranks a rank has 16.8 million logits, and with 32,768 accumulated pairs on one rank 1.07
billion, four gigabytes for each direction. In chunks, each chunk's logits are computed in the forward pass, reduced to
a sum and forgotten, and computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""Logits of a chunk where no size is given: 256 MiB in float32."""


def sum_over_chunks(loss_of: Callable[[slice], Tensor], rows: int, columns: int, chunk_size: int | None) -> Tensor:
    """The sum of a loss over all rows of the logits.

    Args:
        loss_of: the sum over some of the rows. With several chunks it runs again in the backward pass.
        chunk_size: rows of a chunk; None: as many as have ``LOGITS_AT_ONCE`` logits.
    """
    size = chunk_size or max(1, LOGITS_AT_ONCE // max(1, columns))
    if size >= rows:
        return loss_of(slice(0, rows))
    chunks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return torch.stack([checkpoint(loss_of, chunk, use_reentrant=False) for chunk in chunks]).sum()
