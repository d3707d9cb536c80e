"""Which tiles the grouped products are launched with, and the table that holds measured ones."""

import itertools
import json

import pytest
import torch
from moe_cases import Shape, make_experts, randn, route

from clipup_kernels.triton import (
    configs,
    dispatch,
    expert_mlp,
    expert_mlp_backward,
    router_logits,
    topk_gating,
    tune,
    warmup,
)
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
    for block in [case.config for case in cases] + list(
        filter(None, tune.candidates_both(arch, kernel, "half", 128, 512))
    ):
        buffers = block.num_stages - 1 if arch == 80 else block.num_stages
        operands = (block.block_m + weights * block.block_n * buffers) * block.block_k * 2
        assert operands <= tune.SHARED_BYTES[arch] and block.block_m * block.block_k / (32 * block.num_warps) <= 128


def test_both_products_take_one_launch_only_where_that_was_measured(table):
    def chosen(rows=100_000):
        return configs.choose_both(False, CPU, torch.float16, rows, 8, 128, 512)

    table.write_text("{}")
    assert chosen() is None
    measured = configs.both_tile(90, 128)
    configs.store({configs.entry_name(90, "project_both", "half", "many", 128, 512): measured})
    assert chosen() == measured and chosen(100) is None


def test_both_products_take_one_launch_only_where_rows_fill_the_gpu_twice_over(table, monkeypatch):
    def chosen(rows):
        return configs.choose_both(False, CPU, torch.float16, rows, 1, 64, 256)

    configs.store({configs.entry_name(90, "project_both", "half", "many", 64, 256): configs.both_tile(90, 64)})
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


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"a": 3}', '{"a": [64, 64, 64, 4, 3, false]}', '{"a": [64, 96, 64, 4, 3, false, false]}',
        '{"a": [64, 64, 64, 4, 3, 1, false]}', '{"a": [64, 64, 64, 4, 3, false, 1]}',
        '{"a": [64, 64, 64, 4, 0, false, false]}', '{"a": [64, 64, 64, 4, 3, false, false, false]}',
        '{"sm90 project_rows half many 64x64": null}',
        '{"sm90 project_both half many 64x256": [128, 32, 64, 8, 3, true, false]}',
        '{"sm90 project_both half many 64x256": [128, 32, 64, 8, 3, false, true]}',
    ],
)  # fmt: skip
def test_a_broken_table_is_refused_by_its_path(table, content):
    table.write_text(content)
    with pytest.raises(ValueError, match="table.json.*delete it"):
        configs.choose("project_rows", CPU, torch.bfloat16, 50000, 8, 3072, 768)


def test_a_table_that_was_named_must_exist(table):
    with pytest.raises(FileNotFoundError, match="table.json"):
        configs.choose("project_rows", CPU, torch.bfloat16, 50000, 8, 3072, 768)


def test_without_a_name_the_table_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(configs.TABLE_PATH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.table_path() == tmp_path / "clipup" / "triton_configs.json"


def test_without_a_home_there_is_no_table_and_none_can_be_stored(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(configs.TABLE_PATH, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(configs.Path, "home", no_home)
    configs.forget()
    assert configs.table() == {}
    with pytest.raises(RuntimeError, match="no home directory .* set CLIPUP_TRITON_CONFIGS"):
        configs.store({})
    configs.forget()


def test_an_old_gpu_is_refused_with_a_fix(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="8.0.*7.5.*CLIPUP_BACKEND=torch_eager"):
        configs.architecture(torch.device("cuda:0"))


@pytest.mark.parametrize(("capability", "arch"), [((8, 6), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)])
def test_relatives_of_a_large_chip_share_its_tiles(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda:0")) == arch


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_warmup_launches_the_routing_of_a_training_step(monkeypatch, masked, dtype):
    """Each kernel, with the same constants, and arguments of the same types, or None."""
    launched = set()

    def note(module, name):
        kernel = getattr(module, name)

        class Noting:
            def __getitem__(self, grid):
                def launch(*arguments, **constants):
                    types = tuple(getattr(argument, "dtype", argument is None) for argument in arguments)
                    launched.add((name, types, tuple(sorted(constants.items()))))
                    return kernel[grid](*arguments, **constants)

                return launch

        monkeypatch.setattr(module, name, Noting())

    for module, names in {
        router_logits: ("_logits", "_token_gradient", "_weight_sums"),
        topk_gating: ("_gating", "_gating_backward"),
        dispatch: ("_count", "_assign"),
    }.items():
        for name in names:
            note(module, name)
    warmup.warmup(24, 40, 4, 2, [20], dtype=torch.float16, device="cpu")
    warm = set(launched)
    launched.clear()

    x, router = randn(20, 24, dtype=dtype), randn(4, 24)
    mask = torch.arange(20) % 3 > 0 if masked else None
    logits = router_logits.router_logits(x, router, mask)
    gates, indices, _, mean_probs, z_loss, _ = topk_gating.topk_gating(logits, 2, True, None, mask)
    dispatch.dispatch(indices, 4, 1.0, None, mask)
    topk_gating.topk_gating_backward(logits, indices, True, mask, gates, None, mean_probs, z_loss)
    router_logits.router_logits_backward(logits, x, router, mask, [True, True])

    assert len({name for name, *_ in launched}) == 7
    assert launched <= warm


def test_warmup_launches_what_a_training_step_launches(monkeypatch):
    asked = []
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda *arguments: asked.append(arguments) or choose(*arguments))
    warmup.warmup(24, 40, 4, 2, [20], dtype=torch.float16, device="cpu", gated=True)
    warm = set(asked)
    assert {kernel for kernel, *_ in warm} == {
        "project_in_gated", "project_rows", "project_rows_transposed", "project_back", "expert_gradients",
        "project_both_gated",
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


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("arch", tune.SHARED_BYTES)
def test_tuning_tries_about_thirty_tiles_with_and_without_descriptors(arch, kernel):
    tiles = list(tune.candidates(arch, kernel, "half", 768, 3072))
    assert 10 <= len(tiles) <= 36 and len(set(tiles)) == len(tiles)
    with_descriptors = arch >= 90 and kernel not in configs.GRADIENTS
    assert {tile.descriptors for tile in tiles} == ({False, True} if with_descriptors else {False})
    assert {tile.row_descriptors for tile in tiles} == ({False, True} if arch >= 90 else {False})
    for tile in tune.candidates(arch, kernel, "half", 750, 3072):
        assert not (tile.descriptors or tile.row_descriptors)
    for kind in ("tf32", "ieee"):
        tiles = list(tune.candidates(arch, kernel, kind, 768, 3072))
        assert 5 <= len(tiles) <= 32 and not any(tile.row_descriptors for tile in tiles)


def test_tuning_takes_the_fastest_tile_if_it_is_faster_by_more_than_noise():
    first, second, third, *_ = tune.candidates(90, "project_in", "half", 768, 3072)
    times = {None: 1.02, first: 1.0, second: 0.99, third: 0.97}

    def fastest(*tiles):
        return tune.fastest(lambda tile: tile, tiles, lambda run: times[run()])

    assert fastest(first, second) == (first, {first: 1.0, second: 0.99})
    assert fastest(first, second, third)[0] == third
    assert fastest(None, second)[0] == second and fastest(None, first)[0] is None


def test_tuning_leaves_out_tiles_without_room_and_names_those_that_fail_or_are_wrong(capsys):
    from triton.runtime.errors import OutOfResources

    first, exact, close, wrong, infinite, absent, large, fails, *_ = tune.candidates_both(
        90, "project_both", "half", 64, 512
    )
    right = torch.randn(8, 8)
    results = {first: right, exact: right, close: right + 0.01 * right.max(), wrong: right + right.max()}
    results |= {infinite: right.clone().fill_(float("nan")), absent: None}

    def launch(tile):
        if tile == large:
            raise OutOfResources(300000, 232448, "shared memory")
        if tile == fails:
            raise RuntimeError("PassManager::run failed\nwith a long log")
        return None, results[tile]

    product = tune.Product("project_both", 64, 512, launch)
    tiles = [first, exact, close, wrong, infinite, absent, large, fails, first]
    assert tune.usable(product, tiles, "half", threads=1) == [first, exact, close]
    told = capsys.readouterr().out
    assert all(f"left out: project_both: {tile}: its results differ" in told for tile in (wrong, infinite, absent))
    assert f"{fails}: RuntimeError: PassManager::run failed\n" in told and str(large) not in told


def test_tuning_takes_one_number_of_tokens_for_each_class_of_rows():
    assert tune.buckets([40, 4096], 2, 8) == {"few": 40, "many": 4096}
    with pytest.raises(ValueError, match="--tokens: 4096 and 50000 share the class 'many'.*name one"):
        tune.buckets([4096, 50000], 2, 8)


def test_tuning_a_layer_stores_the_fastest_tile_of_every_product_for_each_class_of_rows(monkeypatch, table, capsys):
    fast, both = Config(32, 32, 32, 4, 2), configs.both_tile(90, 24)
    monkeypatch.setattr(tune, "candidates", lambda *which: [fast])
    monkeypatch.setattr(tune, "candidates_both", lambda *which: [None, both])
    turns = itertools.cycle([2.0, 1.0])  # the usual tile, which is that of both classes, and the other
    tune.tune_layer((24, 64, 2, 1), {"few": 20, "some": 150}, torch.float16, CPU, False, lambda run: next(turns), 1)
    stored = json.loads(table.read_text())
    for bucket in ("few", "some"):
        entries = {name: config for name, config in stored.items() if f" {bucket} " in name}
        assert len(entries) == 8 and len({name.split()[1] for name in entries}) == 7
        for name, config in entries.items():
            assert config == list(both if "project_both" in name else fast), name
    assert len(stored) == len(capsys.readouterr().out.splitlines()) == 2 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no CUDA device"), (["--tokens", "4096", "50000"], "--tokens: 4096 and 50000 share")],
)
def test_the_tuning_command_says_what_is_missing(capsys, arguments, message):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        tune.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_tuning_both_products_of_inference_tries_two_launches_and_tiles_for_the_width():
    for kernel in configs.BOTH_KERNELS:
        two_launches, *tiles = tune.candidates_both(90, kernel, "half", 256, 1024)
        assert two_launches is None and len(set(tiles)) == len(tiles) > 3 and {tile.block_k for tile in tiles} == {256}
    assert any(tile and tile.block_k == 512 for tile in tune.candidates_both(90, "project_both", "half", 512, 2048))
    for without in (
        (90, "ieee", 128, 512), (90, "half", 1024, 4096), (90, "half", 120, 512), (90, "half", 128, 40),
        (90, "half", 384, 1536),
    ):  # fmt: skip
        arch, *sizes = without
        assert list(tune.candidates_both(arch, "project_both", *sizes)) == [None]


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "gated"])
def test_tuning_measures_every_product_of_training_and_both_of_inference(gated):
    products = list(tune.products(24, 40, 4, 2, 20, torch.float16, "cpu", gated))
    kernels = {*configs.KERNELS, *configs.BOTH_KERNELS} - {"project_in_gated", "project_both_gated"}
    assert {product.kernel.removesuffix("_gated") for product in products} == kernels
    assert ("project_in_gated" in {product.kernel for product in products}) == gated
    for product in products:
        assert {product.depth, product.columns} == {24, 40}
        usual = configs.heuristic(90, product.kernel, "half", "few", product.depth, product.columns)
        other = Config(32, 8, 32, 4, 2) if usual is None else usual._replace(block_m=32, block_n=16)
        assert tune.usable(product, [usual, other], "half", threads=1) == [usual, other]
