"""A distributed evaluation gives the results of a single process."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clipup.evaluate import Share, evaluate_retrieval, zero_shot
from clipup.evaluate.retrieval import NonFiniteFeatures

WORDS = "cat dog sun sea tree house road boat bird".split()


def all_shares(count, call, in_step=False):
    """The results of ``call(share)`` in ``count`` threads, which simulate processes."""
    barrier, boxes = threading.Barrier(count, timeout=60), [None] * count

    def gather_as(index):
        def gather(value):
            boxes[index] = value
            barrier.wait()
            values = list(boxes)
            barrier.wait()
            return values

        return gather

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: call(Share(index, count, gather_as(index), in_step)), range(count)))


@pytest.fixture
def samples():
    """Nine images with one to three captions, some of them equal."""
    return [
        (torch.randn(3, 16, 16), [f"a {word}", "a thing", f"one {word} more"][: 1 + n % 3], {"group": n % 2})
        for n, word in enumerate(WORDS)
    ]


@pytest.mark.parametrize("count, batch_size", [(2, 4), (3, 2)])
@pytest.mark.parametrize("multi_positive", [False, True])
def test_distributed_retrieval_equals_that_of_one_process(model, tokenizer, samples, count, batch_size, multi_positive):
    options = {"batch_size": batch_size, "by": "group", "multi_positive": multi_positive}
    alone = evaluate_retrieval(model, samples, tokenizer, **options)

    def evaluate(share):
        mine = share.part(samples, batch_size)
        return evaluate_retrieval(copy.deepcopy(model), mine, tokenizer, share=share, **options)

    first, *others = all_shares(count, evaluate)

    assert first == alone and others == [None] * (count - 1)


@pytest.mark.parametrize("count, batch_size", [(2, 2), (4, 16)])
def test_distributed_classification_equals_that_of_one_process(model, tokenizer, samples, count, batch_size):
    labelled = [(image, index % len(WORDS)) for index, (image, _, _) in enumerate(samples)]
    templates = ["a {}", "one {} more"]

    def classify(share):
        mine = share.part(labelled, batch_size)
        options = {"templates": templates, "batch_size": batch_size, "share": share}
        return zero_shot(copy.deepcopy(model), mine, WORDS, tokenizer, **options)

    alone = zero_shot(model, labelled, WORDS, tokenizer, templates=templates, batch_size=batch_size)

    assert all_shares(count, classify) == [alone] * count
    assert alone["images"] == alone["classes"] == 9


@pytest.mark.parametrize("count, batch_size", [(2, 4), (3, 8), (4, 16)])
def test_processes_that_hold_parts_of_a_model_encode_equally_many_batches(model, tokenizer, samples, count, batch_size):
    """Each call of an encoder gathers the others' weights, so it waits for them."""
    labelled = [(image, index) for index, (image, _, _) in enumerate(samples)]
    together = threading.Barrier(count, timeout=5)

    def gathering(encode):
        def call(*arguments, **options):
            together.wait()
            return encode(*arguments, **options)

        return call

    def evaluate(share):
        sharded = copy.deepcopy(model)
        for name in ("encode_image", "encode_text"):
            setattr(sharded, name, gathering(getattr(sharded, name)))
        options = {"batch_size": batch_size, "share": share}
        found = evaluate_retrieval(sharded, share.part(samples, batch_size), tokenizer, **options)
        mine, templates = share.part(labelled, batch_size), ["a {}", "one {} more"]
        return found, zero_shot(sharded, mine, WORDS, tokenizer, templates=templates, **options)

    (first, accuracy), *others = all_shares(count, evaluate, in_step=True)

    assert first == evaluate_retrieval(model, samples, tokenizer, batch_size=batch_size)
    assert others == [(None, accuracy)] * (count - 1)


def test_features_that_are_not_finite_fail_in_every_process(model, tokenizer, samples):
    with torch.no_grad():
        model.text_projection.fill_(torch.nan)

    def evaluate(share):
        with pytest.raises(NonFiniteFeatures):
            evaluate_retrieval(copy.deepcopy(model), share.part(samples, 4), tokenizer, batch_size=4, share=share)
        return True

    assert all_shares(2, evaluate) == [True, True]
