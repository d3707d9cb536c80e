"""The prediction of a launch: never shorter than what bounds it, and longer where an epilogue overlaps nothing."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_model
import pytest
from gpu_model import Code, predict, products

LAYER = (100_000, 768, 3072, 8)
TILES = {"128x128x64": (128, 128, 64), "128x256x64": (128, 256, 64)}


@pytest.fixture
def code(monkeypatch):
    """Sets the machine code that the model sees; tiles are those of the variants' names."""

    def set_code(**changes):
        def code_of(name, tile):
            assert tile is None
            sizes = next(sizes for text, sizes in TILES.items() if text in name)
            return usual._replace(**changes), dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True)), 8

        monkeypatch.setattr(gpu_model, "code_of", code_of)

    usual = Code(registers=128, shared_bytes=98304, step=150, after=1500, again=0)
    set_code()
    return set_code


def of(name, training=True, l2=7.5e12):
    (product,) = (product for product in products(*LAYER, training) if product.name == name)
    return predict(product, l2, None)


def test_a_launch_takes_at_least_as_long_as_everything_that_bounds_it(code):
    for training in (False, True):
        for product in products(*LAYER, training):
            found = predict(product, 7.5e12, None)
            assert found.total > max(found.tensor, found.issue, found.l2, found.dram) > 0, product.name


def test_the_products_of_a_pass_do_the_flops_of_the_layer(code):
    flops_per_ms = gpu_model.TENSOR_FLOPS * gpu_model.MULTIPROCESSORS * gpu_model.CLOCK / 1e3
    for training, number in ((False, 2), (True, 6)):
        flops = sum(predict(product, 7.5e12, None).tensor for product in products(*LAYER, training)) * flops_per_ms
        assert flops == pytest.approx(number * 2 * 100_000 * 768 * 3072, rel=0.01)


def test_with_one_register_too_many_the_epilogue_is_added(code):
    shared = of("project_back")
    code(registers=129)
    alone = of("project_back")
    assert (shared.blocks, alone.blocks) == (2, 1) and alone.total > shared.total + 0.2


def test_the_instructions_of_an_epilogue_s_loop_count_in_every_turn(code):
    code(after=1000, again=0)
    once = (of("project_back").issue, of("project_in").issue)
    code(after=1000, again=900)
    twice = (of("project_back").issue, of("project_in").issue)
    per_instruction = 100_512 * 3072 / (128 * 128) * 8 / 4 / gpu_model.MULTIPROCESSORS / gpu_model.CLOCK * 1e3
    assert twice[0] - once[0] == pytest.approx(900 * per_instruction, rel=0.01) and twice[1] == once[1]


def test_results_and_what_an_epilogue_reads_go_through_the_cache_as_well(code):
    inference, training, back = (of("project_in", False), of("project_in"), of("project_back"))
    one_pass = 2 * 100_512 * 3072 / 7.5e12 * 1e3  # [R, H], with the tiles of rows that are half full
    assert training.l2 - inference.l2 == pytest.approx(one_pass, rel=0.01)
    assert back.l2 - training.l2 == pytest.approx(one_pass, rel=0.01)


def test_a_slower_cache_and_a_longer_loop_cost_time(code):
    assert of("project_in", l2=5.5e12).total == pytest.approx(of("project_in").total * 7.5 / 5.5, rel=0.02)
    code(step=2000)
    assert of("project_in").total > 1.5 * of("project_in").l2


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_program_predicts_every_launch_from_compiled_kernels():

    program = Path(gpu_model.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(program.parents[1]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if "of dense_k" in line] == ["forward", "forward + backward"]
    for name in ("project_in", "project_rows", "combine", "project_back", "expert_gradients", "gather_sum"):
        assert any(line.startswith(name) for line in lines), name


def test_the_ratio_to_dense_k_depends_on_the_rate_of_its_products(code, capsys):
    ratios = []
    for rate in ("650", "800"):
        gpu_model.main(["--cublas", rate])
        told = [line for line in capsys.readouterr().out.splitlines() if "of dense_k" in line]
        ratios += [float(line.split(", ")[1].split()[0]) for line in told]
    slow_forward, slow_both, fast_forward, fast_both = ratios
    assert fast_forward > 1.1 * slow_forward and fast_both > 1.1 * slow_both
