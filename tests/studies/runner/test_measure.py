"""Recall within groups: an image against the texts of its own group, and the other way round."""

from types import SimpleNamespace

import torch

from studies.runner import measure


def numbers(monkeypatch, images, texts, group_size):
    """Of samples whose captions are their rows; no network."""
    monkeypatch.setattr(measure, "encode_images", lambda model, images, batch: torch.stack(list(images)))
    monkeypatch.setattr(measure, "encode_texts", lambda model, captions, *rest: texts[[int(row) for row in captions]])
    model = SimpleNamespace(logit_scale=torch.tensor(0.0))
    samples = [(image, [str(row)], {}) for row, image in enumerate(images)]
    return measure.retrieval_numbers(model, samples, None, group_size=group_size)


def test_nll_at_the_best_temperature_is_that_of_equal_models_however_sure_they_are(monkeypatch):
    monkeypatch.setattr(measure, "encode_images", lambda *arguments: torch.eye(8))
    texts = (torch.eye(8) + 0.4 * torch.eye(8).roll(1, 0) + 1.1 * torch.eye(8).flip(0)).mul(0.1)  # sometimes wrong
    monkeypatch.setattr(measure, "encode_texts", lambda *arguments: texts)
    samples = [(None, [str(row)], {}) for row in range(8)]
    modest, sure = (
        measure.retrieval_numbers(
            SimpleNamespace(logit_scale=torch.tensor(scale).log()), samples, None, best_temperature=True
        )
        for scale in (10.0, 1000.0)
    )
    for way in ("text_to_image", "image_to_text"):
        assert modest[f"{way}_best_nll"] == sure[f"{way}_best_nll"] < sure[f"{way}_nll"]


def test_group_recall_counts_texts_and_images_of_the_same_group_only(monkeypatch):
    images = torch.eye(4)[[0, 1, 0, 1]]  # the second group looks like the first
    result = numbers(monkeypatch, images, torch.eye(4)[[0, 1, 0, 1]], 2)
    assert result["text_to_image_R@1"] < 1 and result["text_to_image_group"] == result["image_to_text_group"] == 1


def test_group_recall_differs_by_direction(monkeypatch):
    scores = torch.tensor([[2.0, 3.0], [0.0, 4.0]])  # both rows have their largest value in the second column
    for texts, shares in ((scores, (0.5, 1.0)), (scores.T, (1.0, 0.5))):
        result = numbers(monkeypatch, torch.eye(2), texts, 2)
        assert (result["text_to_image_group"], result["image_to_text_group"]) == shares


def test_pair_accuracy_is_chance_where_a_bag_of_words_cannot_decide(monkeypatch):
    # words, colours bound to things, relation, concept: a model that knows words and concepts only
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(2, 1)
    result = numbers(monkeypatch, features, features, 4)
    for way in ("text_to_image", "image_to_text"):
        assert result[f"{way}_pairs"] == [0.5, 0.5, 1.0]
    whole = numbers(monkeypatch, torch.eye(8), torch.eye(8), 4)
    assert whole["image_to_text_pairs"] == whole["text_to_image_pairs"] == [1, 1, 1]
    assert numbers(monkeypatch, torch.eye(8), torch.eye(8).flip(0), 8)["image_to_text_pairs"] == [0.5] * 6 + [0.0]
