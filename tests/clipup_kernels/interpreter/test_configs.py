"""Which tiles the grouped products are launched with, and the table that holds measured ones."""

import json
from types import SimpleNamespace

import pytest
import torch
from moe_cases import Shape, make_experts, randn, route

from clipup_kernels.triton import configs, expert_mlp, expert_mlp_backward, tune, warmup
from clipup_kernels.triton.configs import Config
from clipup_kernels.triton.grouped_gemm import max_tiles

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
@pytest.mark.parametrize("arch", tune.SHARED_BYTES)
def test_operands_fit_into_shared_memory_and_sums_into_registers(arch, kernel):
    cases = list(configs.cases(arch, kernel))
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert sum(case.is_main for case in cases) == 1
    for case in cases:
        block = case.config
        columns = block.block_n * (2 if kernel == "project_in_gated" else 1)
        operands = (block.block_m + columns) * block.block_k * case.dtype.itemsize * block.num_stages
        assert operands <= tune.SHARED_BYTES[arch], case
        assert block.block_m * columns / (32 * block.num_warps) <= 128, case


@pytest.mark.parametrize("kernel", configs.BOTH_KERNELS)
@pytest.mark.parametrize("arch", tune.SHARED_BYTES)
def test_both_products_in_one_launch_fit_into_shared_memory_and_registers(arch, kernel):
    weights = 3 if kernel == "project_both_gated" else 2
    cases = list(configs.cases_both(arch, kernel))
    assert {case.config.block_k for case in cases if not case.even} == {128, 256}
    assert sum(case.is_main for case in cases) == 1
    for block in [case.config for case in cases] + list(filter(None, tune.candidates_both(arch, kernel, 2, 128, 512))):
        buffers = block.num_stages - 1 if arch == 80 else block.num_stages
        operands = (block.block_m + weights * block.block_n * buffers) * block.block_k * 2
        assert operands <= tune.SHARED_BYTES[arch] and block.block_m * block.block_k / (32 * block.num_warps) <= 128


def test_both_products_take_one_launch_only_where_two_blocks_share_a_multiprocessor():
    def usual(kind="half", bucket="many", width=128, hidden=512, arch=90, kernel="project_both"):
        return configs.heuristic(arch, kernel, kind, bucket, width, hidden)

    assert usual().block_k == usual(width=96).block_k == usual(arch=100).block_k == 128
    for other in (
        usual("tf32"), usual("ieee"), usual(bucket="some"), usual(bucket="few"), usual(width=144), usual(width=120),
        usual(hidden=520), usual(arch=80), usual(kernel="project_both_gated"),
    ):  # fmt: skip
        assert other is None


def test_both_products_take_one_launch_only_where_rows_fill_the_gpu_twice_over(monkeypatch):
    def chosen(rows):
        return configs.choose_both(False, torch.device("cpu"), torch.float16, rows, 1, 64, 256)

    assert chosen(1024).block_m == 128
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 4)
    assert chosen(1024) is not None and chosen(1023) is None


def test_the_grid_covers_every_way_to_part_rows_among_experts():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        experts, block = int(torch.randint(1, 9, (), generator=generator)), 16
        counts = torch.randint(0, 40, (experts + 1,), generator=generator)
        needed = int(((counts + block - 1) // block).sum())
        assert needed <= max_tiles(int(counts.sum()), experts, block)
    assert max_tiles(9 + 9 * 16, 8, 16) == 18  # nine groups of a full tile and one row


def test_small_products_get_small_tiles():
    tile = configs.heuristic(90, "project_in", "half", "few", depth=19, columns=24)
    assert (tile.block_m, tile.block_n, tile.block_k) == (64, 32, 32)


def test_no_tile_of_256_columns_is_half_empty():
    assert configs.heuristic(90, "project_rows", "half", "many", 3072, 768).block_n == 256
    assert configs.heuristic(90, "project_rows", "half", "many", 2560, 640).block_n == 128


def test_float32_is_rounded_to_tf32_only_where_torch_allows_it(monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert configs.precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert configs.precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_what_was_measured_is_used_and_nothing_else_changes(table):
    usual = configs.heuristic(90, "project_in", "half", "many", 768, 3072)
    measured = Config(64, 128, 32, 8, 2, True, 2)
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


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"a": 3}', '{"a": [64, 64, 64, 4, 3]}', '{"a": [64, 96, 64, 4, 3, false]}',
        '{"a": [64, 64, 64, 4, 3, false, -1]}', '{"a": [64, 64, 64, 4, 3, false, true]}',
        '{"sm90 project_rows half many 64x64": null}',
        '{"sm90 project_both half many 64x256": [128, 32, 64, 8, 3, false, 1]}',
        '{"sm90 project_both half many 64x256": [128, 32, 64, 8, 3, true, 0]}',
    ],
)  # fmt: skip
def test_a_broken_table_is_refused_by_its_path(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match="table.json.*delete it"):
        configs.choose("project_rows", CPU, torch.bfloat16, 50000, 8, 3072, 768)


def test_a_table_from_before_persistent_products_is_read(table):
    name = configs.entry_name(90, "project_rows", "half", "many", 3072, 768)
    table.write_text(json.dumps({name: [64, 128, 32, 8, 2, False]}))
    assert configs.choose("project_rows", CPU, torch.bfloat16, 50000, 8, 3072, 768) == Config(64, 128, 32, 8, 2)


@pytest.mark.parametrize(
    ("persistent", "tiles", "blocks"), [(0, 1000, 1000), (1, 1000, 132), (2, 1000, 264), (2, 9, 9)]
)
def test_a_persistent_product_gets_some_blocks_for_every_multiprocessor(monkeypatch, persistent, tiles, blocks):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = Config(128, 128, 64, 8, 3, persistent=persistent)
    assert configs.num_blocks(tiles, config, torch.device("cuda:0")) == blocks


def test_a_table_that_was_named_must_exist(table):
    with pytest.raises(FileNotFoundError, match="table.json"):
        configs.choose("project_rows", CPU, torch.bfloat16, 50000, 8, 3072, 768)


def test_without_a_name_the_table_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(configs.TABLE_PATH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.table_path() == tmp_path / "clipup" / "triton_configs.json"


def test_an_old_gpu_is_refused_with_a_fix(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="8.0.*7.5.*CLIPUP_BACKEND=torch_eager"):
        configs.architecture(torch.device("cuda:0"))


@pytest.mark.parametrize(("capability", "arch"), [((8, 6), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)])
def test_relatives_of_a_large_chip_share_its_tiles(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda:0")) == arch


def test_warmup_launches_what_a_training_step_launches(monkeypatch):
    asked = []
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda *arguments: asked.append(arguments) or choose(*arguments))
    warmup.warmup(24, 40, 4, 2, [20], dtype=torch.float16, device="cpu", gated=True)
    warm = set(asked)
    assert {kernel for kernel, *_ in warm} == {
        "project_in_gated", "project_rows", "project_back", "weight_gradient", "project_both_gated",
    }  # fmt: skip
    asked.clear()
    shape = Shape(tokens=20, width=24, hidden=40, experts=4, k=2)
    experts = make_experts(shape, torch.float16, gated=True)
    gates, plan = route(shape)
    x = randn(20, 24, dtype=torch.float16)
    arguments = (x, gates, *plan, *experts[:4], *experts[5:])
    for keep_z in (True, False):  # computed again in the backward pass
        y, z = expert_mlp.expert_mlp_forward(*arguments, "gelu", keep_z)
        expert_mlp_backward.expert_mlp_backward(y, *arguments, z, "gelu", [True] * 4)
    assert set(asked) == warm


def test_tuning_takes_the_quickest_tile_that_the_gpu_has_room_for():
    from triton.runtime.errors import OutOfResources

    tiles = list(tune.candidates(90, "project_in", 2, 768, 3072))
    assert len(tiles) > 10 and len(set(tiles)) == len(tiles)
    assert {tile.descriptors for tile in tiles} == {False, True}
    for without in (
        (80, "project_in", 2, 768, 3072),
        (90, "project_in", 2, 750, 3072),
        (90, "weight_gradient", 2, 768, 3072),
    ):
        assert not any(tile.descriptors for tile in tune.candidates(*without))
    gated = list(tune.candidates(90, "project_in_gated", 2, 768, 3072))
    assert (128, 256) in {tile[:2] for tile in tiles} and (128, 256) not in {tile[:2] for tile in gated}
    times = {tile: 1.0 + number for number, tile in enumerate(reversed(tiles))}

    def launch(tile):
        if tile == tiles[-1]:
            raise OutOfResources(300000, 232448, "shared memory")
        return tile

    best, time = tune.fastest(launch, iter(tiles), lambda run: times[run()])
    assert best == tiles[-2] and time == 2.0
    near = {tiles[0]: 1.0, tiles[1]: 0.99, tiles[2]: 0.97}
    assert tune.fastest(lambda tile: tile, tiles[:2], lambda run: near[run()]) == (tiles[0], 1.0)  # that is noise
    assert tune.fastest(lambda tile: tile, tiles[:3], lambda run: near[run()]) == (tiles[2], 0.97)
    assert tune.fastest(lambda tile: tile, [None, best], lambda run: {None: 1.0, best: 2.0}[run()])[0] is None
    forms = list(tune.persistent_forms(best))
    assert forms[0] == best and [form.persistent for form in forms] == [0, 1, 2, 4]


def test_tuning_both_products_of_inference_tries_two_launches_and_tiles_for_the_width():
    for kernel in configs.BOTH_KERNELS:
        two_launches, *tiles = tune.candidates_both(90, kernel, 2, 256, 1024)
        assert two_launches is None and len(set(tiles)) == len(tiles) > 3 and {tile.block_k for tile in tiles} == {256}
    assert any(tile and tile.block_k == 512 for tile in tune.candidates_both(90, "project_both", 2, 512, 2048))
    for without in ((90, 4, 128, 512), (90, 2, 1024, 4096), (90, 2, 120, 512), (90, 2, 128, 40), (90, 2, 384, 1536)):
        arch, *sizes = without
        assert list(tune.candidates_both(arch, "project_both", *sizes)) == [None]


def test_tuning_measures_every_product_of_training_and_both_of_inference():
    products = list(tune.products(24, 40, 4, 2, 20, torch.float16, "cpu", gated=True))
    assert {kernel for kernel, *_ in products} == {
        "project_in_gated", "project_rows", "project_back", "weight_gradient", "project_both_gated",
    }  # fmt: skip
    for kernel, depth, columns, launch in products:
        assert {depth, columns} == {24, 40}
        launch(configs.heuristic(90, kernel, "half", "few", depth, columns))
    torch.testing.assert_close(launch(None), launch(Config(32, 8, 32, 4, 2)), rtol=0.02, atol=0.02)
