"""The prediction of a launch: never shorter than what bounds it."""

import gpu_model
import pytest
from gpu_model import predict, products

LAYER = (100_000, 768, 3072, 8)


def of(name, training=True, l2=7.5e12):
    (product,) = (product for product in products(*LAYER, training) if product.name == name)
    return predict(product, l2, None)


def test_a_launch_takes_at_least_as_long_as_everything_that_bounds_it_and_products_do_the_flops_of_the_layer():
    flops_per_ms = gpu_model.TENSOR_FLOPS * gpu_model.MULTIPROCESSORS * gpu_model.CLOCK / 1e3
    for training, number in ((False, 2), (True, 6)):
        found = [predict(product, 7.5e12, None) for product in products(*LAYER, training)]
        assert all(one.total > max(one.tensor, one.l2, one.dram) > 0 for one in found)
        flops = sum(one.tensor for one in found) * flops_per_ms
        assert flops == pytest.approx(number * 2 * 100_000 * 768 * 3072, rel=0.01)


def test_results_and_what_an_epilogue_reads_go_through_the_cache_as_well():
    inference, training, back = of("project_in", False), of("project_in"), of("project_back")
    one_pass = 2 * 100_512 * 3072 / 7.5e12 * 1e3  # [R, H], with the tiles of rows that are half full
    assert training.l2 - inference.l2 == pytest.approx(one_pass, rel=0.01)
    assert back.l2 - training.l2 == pytest.approx(one_pass, rel=0.01)
    assert of("project_in", l2=5.5e12).total == pytest.approx(training.total * 7.5 / 5.5, rel=0.02)


def test_the_ratio_to_dense_k_depends_on_the_rate_of_its_products(capsys):
    ratios = []
    for rate in ("650", "800"):
        gpu_model.main(["--cublas", rate])
        told = [line for line in capsys.readouterr().out.splitlines() if "of dense_k" in line]
        ratios += [float(line.split(", ")[1].split()[0]) for line in told]
    assert ratios == [1.04, 1.02, 1.21, 1.18]  # docs/kernels.md
