"""Retrieval recall: known values and a naive implementation. test_clip_benchmark.py compares with CLIP_benchmark."""

import importlib
from math import comb

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipup.evaluate import evaluate_retrieval, retrieval

module = importlib.import_module("clipup.evaluate.retrieval")  # the package's attribute is the function


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6), st.integers(1, 12))
def test_ties_count_as_the_mean_over_all_orders(right, wrong, above, k):
    tied = right + wrong
    rights = torch.tensor([right])

    share = module.hits_at(k, torch.tensor([above]), torch.tensor([tied]), rights).item()

    seen = min(max(k - above, 0), tied)
    assert share == pytest.approx(1 - comb(wrong, seen) / comb(tied, seen))


def drawn_relation(images, texts, more, seed):
    """Features, and (text, image) pairs with one or several matches for every image and every text."""
    generator = torch.Generator().manual_seed(seed)
    image_features = F.normalize(torch.randn(images, 8, generator=generator), dim=-1)
    text_features = F.normalize(torch.randn(texts, 8, generator=generator), dim=-1)
    rows = max(images, texts)
    pairs = torch.stack([torch.arange(rows) % texts, torch.arange(rows) % images], 1)
    extra = torch.stack([torch.randint(count, (more,), generator=generator) for count in (texts, images)], 1)
    pairs = torch.cat([pairs, extra]).unique(dim=0)
    return image_features, text_features, pairs[torch.randperm(len(pairs), generator=generator)]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 20), st.integers(0, 10**6), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_every_image_of_a_text_is_a_match_and_every_text_of_an_image(images, texts, more, seed, chunk):
    image_features, text_features, pairs = drawn_relation(images, texts, more, seed)
    right = set(map(tuple, pairs.tolist()))
    scores = (text_features @ image_features.T).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        result = retrieval(image_features, text_features, pairs)

    for k in (1, 5, 10):
        best_images = [sorted(range(images), key=lambda i, r=row: -r[i])[:k] for row in scores]
        best_texts = [sorted(range(texts), key=lambda t, i=i: -scores[t][i])[:k] for i in range(images)]
        to_image = sum(any((t, i) in right for i in best) for t, best in enumerate(best_images)) / texts
        to_text = sum(any((t, i) in right for t in best) for i, best in enumerate(best_texts)) / images
        assert (result[f"text_to_image_R@{k}"], result[f"image_to_text_R@{k}"]) == pytest.approx((to_image, to_text))
    assert result["chance_R@1"] == pytest.approx(len(right) / images / texts)
    if texts >= images:
        image_of_text = torch.arange(texts) % images
        pairs = torch.stack([torch.arange(texts), image_of_text], 1)
        assert retrieval(*(features := (image_features, text_features)), image_of_text) == retrieval(*features, pairs)


def test_nll_is_minus_log_of_the_probability_of_the_matches():
    image_features, text_features, pairs = drawn_relation(9, 6, 8, torch.seed() % 2**31)
    relation = torch.zeros(6, 9, dtype=torch.bool)
    relation[pairs[:, 0], pairs[:, 1]] = True
    logits = 7.5 * (text_features.double() @ image_features.double().T)

    nll = module.nll_both_ways(image_features, text_features, pairs, logit_scale=7.5)

    for way, scores, right in (("text_to_image", logits, relation), ("image_to_text", logits.T, relation.T)):
        probability = (scores.softmax(1) * right).sum(1)
        assert nll[way] == pytest.approx(-probability.log().mean().item(), rel=1e-5)


def test_with_multi_positive_a_caption_matches_all_its_images(oracle, number_tokenizer, number_image):
    # two images of number 0 have the caption "picture 1", as the image of number 1 has
    samples = [(number_image(number), ["picture 1"], {"group": "a"}) for number in (0, 0, 1)]
    samples.append((number_image(2), ["picture 2"], {"group": "b"}))

    alone = evaluate_retrieval(oracle, samples, number_tokenizer)
    shared = evaluate_retrieval(oracle, samples, number_tokenizer, by="group", multi_positive=True)

    assert (
        alone["captions"] == 4 and alone["text_to_image_R@1"] == 0.5
    )  # one of three equal captions belongs to image 2
    assert shared["captions"] == 2 and shared["gallery"] == 4
    assert shared["text_to_image_R@1"] == 1.0  # image 2 also has the caption "picture 1"
    assert shared["splits"]["a"]["captions"] == 1 and shared["splits"]["a"]["gallery"] == 3


def test_a_data_set_is_encoded_in_batches_and_every_group_is_also_a_separate_gallery(
    oracle, number_tokenizer, number_image
):
    def sample(number, group, *captions):
        return number_image(number), captions, {"group": group}

    samples = [
        sample(0, "emoji", "picture 0", "drawing 0"),
        sample(1, "icons", "picture 1"),
        sample(2, "emoji", "picture 1"),  # a wrong caption: it finds image 1, except among emoji alone
    ]

    result = evaluate_retrieval(oracle, samples, number_tokenizer, batch_size=2, by="group")

    assert result["text_to_image_R@1"] == pytest.approx(3 / 4)
    assert result["gallery"] == 3 and result["captions"] == 4
    assert set(result["splits"]) == {"emoji", "icons"}
    emoji = result["splits"]["emoji"]
    assert emoji["gallery"] == 2 and emoji["captions"] == 3 and emoji["chance_R@1"] == 0.5
    assert emoji["text_to_image_R@1"] == pytest.approx((1 + 1 + 0.5) / 3)  # nothing among emoji looks like a 1: a tie
    assert result["splits"]["icons"]["text_to_image_R@1"] == 1


def test_the_result_does_not_depend_on_the_batch_and_the_model_stays_in_training(model, tokenizer):
    model.train()
    samples = [(torch.randn(3, 16, 16), [f"a {word}", f"one {word} more"], {}) for word in "cat dog sun sea".split()]

    one, four = (evaluate_retrieval(model, samples, tokenizer, batch_size=size) for size in (1, 4))

    assert one == four
    assert model.training and all(layer.training for layer in model.modules())


def test_an_empty_data_set_and_an_image_without_caption_are_refused(oracle, number_tokenizer, number_image):
    with pytest.raises(ValueError, match="the data set is empty"):
        evaluate_retrieval(oracle, [], number_tokenizer)
    with pytest.raises(ValueError, match="image 1 has no caption"):
        evaluate_retrieval(oracle, [(number_image(0), ["number 0"], {}), (number_image(1), [], {})], number_tokenizer)


@pytest.mark.parametrize("image_of_text, texts", [([0, 0], torch.ones(2, 4)), ([0, 1], torch.full((2, 4), torch.nan))])
def test_features_that_cannot_be_ranked_are_refused(image_of_text, texts):
    with pytest.raises(ValueError):
        retrieval(torch.ones(2, 4), texts, torch.tensor(image_of_text))
