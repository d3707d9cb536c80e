"""The place of a process among those that a launcher started, from the environment."""

import pytest
from open_clip_train.distributed import world_info_from_env

from clipup.train.parallel.launched import Launched

VARIABLES = [
    *("LOCAL_RANK", "RANK", "WORLD_SIZE", "MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE", "SLURM_LOCALID", "SLURM_PROCID"),
    *("SLURM_NTASKS", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
]


@pytest.mark.parametrize("present", [VARIABLES[start:] for start in (0, 3, 6, 9, 12)])
def test_it_equals_open_clip_trains(monkeypatch, present):
    for number, variable in enumerate(VARIABLES):
        monkeypatch.delenv(variable, raising=False)
        if variable in present:
            monkeypatch.setenv(variable, str(number))

    assert Launched.from_environment() == world_info_from_env()
