"""Measurements of a study's models."""

from types import SimpleNamespace

import torch

from studies.runner import measure


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
