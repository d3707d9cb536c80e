"""What a forward leaves belongs to the thread that ran it: losses and routing. The load is the layer's."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from clipup import SparseMoE, aux_loss, moe_metrics, update_selection_bias
from clipup.moe.global_batch import StepCounting

D, THREADS, ROUNDS = 12, 4, 10


def make_layer(**options):
    torch.manual_seed(0)
    return SparseMoE(D, 16, **{"num_experts": 4, "balance_weight": 0.5, "z_weight": 0.25, **options})


def tokens(seed, count=10):
    return (1 + seed) * torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def run_together(function, count=THREADS):
    """The results of ``function(index, barrier)`` in as many threads, which have all ended then."""
    barrier = threading.Barrier(count, timeout=60)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda index: function(index, barrier), range(count)))


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_that_train_one_layer_take_their_own_losses(compiled):
    layer = make_layer()
    expected = [(layer(tokens(index)), aux_loss(layer).detach())[1] for index in range(THREADS)]
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    run(tokens(0))
    aux_loss(layer)

    def train(index, barrier):
        losses = []
        for _ in range(ROUNDS):
            barrier.wait()
            y = run(tokens(index))
            barrier.wait()
            losses.append(aux_loss(layer).detach())
            del y
        return losses

    for index, losses in enumerate(run_together(train)):
        for loss in losses:
            torch.testing.assert_close(loss, expected[index])
    assert aux_loss(layer) == 0


def test_losses_over_a_step_have_the_same_gradient_where_another_thread_recomputes_the_forward():
    """A GPU's backward pass, and with it the recomputation of activation checkpointing, runs in autograd's thread."""

    def gradient(forward):
        layer = make_layer(loss_scope="global_batch")
        batches, counting = [tokens(0, count=8), tokens(1, count=40)], StepCounting(layer)
        for batch in batches:
            with torch.no_grad():
                layer(batch)
            counting.add()
        with counting.used(), ThreadPoolExecutor(1) as autograd:
            for batch in batches:
                y = forward(layer, batch.requires_grad_())
                autograd.submit((0 * y.sum() + aux_loss(layer)).backward).result()
        return layer.router.weight.grad

    expected = gradient(lambda layer, batch: layer(batch))
    recomputed = gradient(lambda layer, batch: checkpoint(layer, batch, use_reentrant=False))
    torch.testing.assert_close(recomputed, expected)


def test_metrics_are_of_the_callers_last_forward():
    layer = make_layer().eval()

    def evaluate(index, barrier):
        with torch.no_grad():
            layer(tokens(index, count=8 + index))
        barrier.wait()
        return moe_metrics(layer)[""]

    for index, metrics in enumerate(run_together(evaluate)):
        assert metrics["expert_indices"].shape[0] == 8 + index
    assert moe_metrics(layer) == {}


def test_losses_of_a_running_thread_are_refused_where_the_caller_has_not_run_the_layer():
    layer = make_layer()
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(layer, tokens(0)).result()
        with pytest.raises(RuntimeError, match="call aux_loss there, with nn.DataParallel inside the wrapped module"):
            aux_loss(layer)
        layer.eval()(tokens(1))
        assert aux_loss(layer) == 0
        assert pool.submit(aux_loss, layer).result() > 0 and output.requires_grad


def test_losses_returned_from_the_threads_that_run_the_forwards_train_all_replicas():
    layer = make_layer()
    replicas = [copy.copy(layer) for _ in range(THREADS)]  # as nn.DataParallel's, they share all but modules

    def replica(index, barrier):
        y = replicas[index](tokens(index))
        barrier.wait()
        return y, aux_loss(replicas[index])

    results = run_together(replica)
    found = torch.autograd.grad(sum(y.sum() + loss for y, loss in results), layer.router.weight)
    loss = sum(layer(tokens(index)).sum() for index in range(THREADS)) + aux_loss(layer)
    torch.testing.assert_close(found, torch.autograd.grad(loss, layer.router.weight))


def test_the_load_of_all_threads_is_counted_once():
    options = {"selection_bias": "z_score", "selection_bias_rate": 1.0, "balance_weight": 0.0, "z_weight": 0.0}
    together, alone = make_layer(**options), make_layer(**options)

    def train(index, barrier):
        barrier.wait()
        for _ in range(ROUNDS):
            together(tokens(index))

    for _ in range(2):
        run_together(train)
        for index in range(THREADS):
            for _ in range(ROUNDS):
                alone(tokens(index))
        update_selection_bias(together)
        update_selection_bias(alone)
        assert torch.equal(together.router.selection_bias, alone.router.selection_bias)
        assert together.router.selection_bias.abs().sum() > 0
