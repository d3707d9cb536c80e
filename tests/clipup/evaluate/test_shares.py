"""A distributed evaluation gives the results of a single process."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clipup.evaluate import Share, evaluate_retrieval, zero_shot

WORDS = "cat dog sun sea tree house road boat bird".split()


def all_shares(count, call):
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
        return list(pool.map(lambda index: call(Share(index, count, gather_as(index))), range(count)))


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
