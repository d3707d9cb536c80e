"""Which tiles the grouped products are launched with, and the table that holds measured ones."""

import json
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from clipup_kernels.triton import configs, tune
from clipup_kernels.triton.configs import Config
from clipup_kernels.triton.grouped_gemm import max_tiles
from clipup_kernels.triton.variants import SHARED_BYTES

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table's path."""
    path = tmp_path / "table.json"
    monkeypatch.setenv(configs.TABLE_PATH, str(path))
    configs.forget()
    yield path
    configs.forget()


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_operands_fit_into_shared_memory_and_sums_into_registers(arch, kernel):
    cases = list(configs.cases(arch, kernel))
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert sum(case.is_main for case in cases) == 1
    for case in cases:
        block = case.config
        columns = block.block_n * (2 if kernel == "project_in_gated" else 1)
        operands = (block.block_m + columns) * block.block_k * case.dtype.itemsize * block.num_stages
        assert operands <= SHARED_BYTES[arch], case
        assert block.block_m * columns / (32 * block.num_warps) <= 128, case


def test_the_grid_covers_every_way_to_part_rows_among_experts():
    assert max_tiles(9 + 9 * 16, 8, 16) == 18  # nine groups of a full tile and one row


def test_measured_tiles_are_used_for_their_sizes_alone(table):
    usual = configs.heuristic(90, "project_in", "half", "many", 768, 3072)
    measured = Config(64, 128, 32, 8, 2, True)
    assert measured != usual
    table.write_text("{}")
    assert configs.choose("project_in", CPU, torch.bfloat16, 50000, 8, 768, 3072) == usual
    name = configs.entry_name(90, "project_in", "half", "many", 768, 3072)
    assert configs.store({name: measured}) == table
    configs.store({"another": usual})
    assert configs.choose("project_in", CPU, torch.bfloat16, 50000, 8, 768, 3072) == measured
    assert configs.choose("project_in", CPU, torch.bfloat16, 50, 8, 768, 3072) != measured
    assert configs.choose("project_in", CPU, torch.bfloat16, 50000, 8, 768, 1536) == usual
    assert json.loads(table.read_text()) == {name: list(measured), "another": list(usual)}


def test_without_a_readable_home_there_is_no_table(monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.delenv(configs.TABLE_PATH, raising=False)
    for method in ("exists", "read_text"):
        monkeypatch.setattr(Path, method, forbidden)
    configs.forget()
    assert configs.table() == {}


def test_a_table_that_was_named_must_exist(table):
    with pytest.raises(FileNotFoundError, match="table.json"):
        configs.choose("project_rows", CPU, torch.bfloat16, 50000, 8, 3072, 768)


def test_tuning_leaves_out_tiles_without_room_and_names_those_that_fail_or_are_wrong(capsys):
    first, exact, close, wrong, infinite, absent, large, fails, *_ = tune.candidates(90, "project_in", "half", 64, 512)
    right = torch.randn(8, 8)
    results = {first: right, exact: right, close: right + 0.01 * right.max(), wrong: right + right.max()}
    results |= {infinite: torch.full_like(right, torch.nan), absent: None}
    errors = {large: OutOfResources(300000, 232448, "shared memory"), fails: RuntimeError("PassManager::run failed")}

    def launch(tile):
        if tile in errors:
            raise errors[tile]
        return None, results[tile]

    tiles = [first, exact, close, wrong, infinite, absent, large, fails, first]
    product = tune.Product("project_in", 64, 512, launch)
    assert tune.usable(product, tiles, "half", threads=1) == [first, exact, close]
    told = capsys.readouterr().out
    assert all(str(tile) in told for tile in (wrong, infinite, absent, fails)) and str(large) not in told
