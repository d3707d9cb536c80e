"""The place of a process among those that a launcher started, from the environment."""

from __future__ import annotations

import pytest
from open_clip_train.distributed import world_info_from_env

from clipup.train.ranks.launched import Launched

VARIABLES = [
    *("LOCAL_RANK", "RANK", "WORLD_SIZE", "MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE", "SLURM_LOCALID", "SLURM_PROCID"),
    *("SLURM_NTASKS", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
]


@pytest.mark.parametrize("first", range(len(VARIABLES)))
@pytest.mark.parametrize("count", [0, 1, 3, len(VARIABLES)])
def test_it_equals_open_clip_trains(monkeypatch, first, count):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for number in range(count):
        monkeypatch.setenv((VARIABLES * 2)[first + number], str(number + 1))

    assert Launched.from_environment() == world_info_from_env()
