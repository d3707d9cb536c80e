"""Recall within groups: an image against the texts of its own group, and the other way round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from studies.runner import measure


class Given(nn.Module):
    """Images and texts are their own features."""

    logit_scale = torch.tensor(0.0)
    output_dict = False

    def encode_image(self, images, normalize=False):
        return images.flatten(1)

    def encode_text(self, texts, normalize=False):
        return texts.float()

    def parameters(self, recurse=True):
        return iter([torch.zeros(1)])


def numbers(monkeypatch, images, texts, group_size):
    """Of samples whose captions are their rows; no network."""
    monkeypatch.setattr(measure, "encode_images", lambda model, found, batch: torch.stack(list(found)))
    monkeypatch.setattr(measure, "encode_texts", lambda model, found, *rest: texts[[int(one) for one in found]])
    samples = [(image, [str(row)], {}) for row, image in enumerate(images)]
    return measure.retrieval_numbers(Given(), samples, None, group_size=group_size)


def test_only_texts_and_images_of_the_own_group_compete(monkeypatch):
    images = torch.eye(4)[[0, 1, 0, 1]]  # the second group looks like the first
    found = numbers(monkeypatch, images, torch.eye(4)[[0, 1, 0, 1]], 2)
    assert found["t2i"]["r1"] < 1 and found["t2i"]["group"] == found["i2t"]["group"] == 1


def test_both_directions_are_told_apart(monkeypatch):
    images = torch.tensor([[1.0, 0.2], [0.9, 0.1]])  # both texts like the first image best
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = numbers(monkeypatch, images, texts, 2)
    assert found["t2i"]["group"] == pytest.approx(0.5) and found["i2t"]["group"] == pytest.approx(0.5)
    found = numbers(monkeypatch, images, torch.tensor([[1.0, 0.0], [1.1, 0.0]]), 2)
    assert found["t2i"]["group"] == pytest.approx(0.5) and found["i2t"]["group"] == pytest.approx(0.5)
    found = numbers(monkeypatch, torch.tensor([[1.0, 0.0], [0.5, 0.1]]), torch.tensor([[0.9, 0.0], [1.0, 3.0]]), 2)
    assert found["t2i"]["group"] == 0.5 and found["i2t"]["group"] == 0.5


def test_without_a_size_there_are_no_groups(monkeypatch):
    assert "group" not in numbers(monkeypatch, torch.eye(4), torch.eye(4), None)["t2i"]
