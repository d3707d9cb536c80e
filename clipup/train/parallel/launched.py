"""The place of this process among those that a launcher started, from the environment."""

from __future__ import annotations

import os
from typing import NamedTuple

_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
_RANK = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Environment variables of launchers, in the order in which they are looked up; the first that is set counts."""


class Launched(NamedTuple):
    """The place of this process among those that a launcher such as torchrun started."""

    local_rank: int
    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Launched:
        return cls(first_set(_LOCAL_RANK, 0), first_set(_RANK, 0), first_set(WORLD_SIZE, 1))


def first_set(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)
