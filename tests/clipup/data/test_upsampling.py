"""Sources of shards that are drawn more often than others."""

from __future__ import annotations

import pytest
from picture_samples import preprocess, samples_of, tokenizer

from clipup.data.loaders import train_loader


@pytest.fixture
def drawn(pictures, monkeypatch):
    """The numbers of the shards, of four, that an epoch of 400 samples is drawn from."""
    monkeypatch.setattr("clipup.data.streamed._SAMPLE_BUFFER", (1, 1))
    pictures.shards(24, 4)
    folder = pictures.folder
    source = f"{folder}/train-000000.tar::{folder}/train-{{000001..000003}}.tar"

    def drawn(factors, **changes):
        options = {"dataset_resampled": True, "train_num_samples": 2400, **changes}
        data = train_loader(
            source, preprocess, tokenizer, 6, 0, progress=False, train_data_upsampling_factors=factors, **options
        )
        return [picture // 6 for picture, _, _ in samples_of(data.dataloader)[::6]]

    return drawn


@pytest.mark.parametrize("factors, share", [(None, 1 / 4), ("1::1", 1 / 4), ("9::1", 3 / 4), ("0.5::3", 1 / 19)])
def test_shards_of_a_source_are_drawn_in_proportion_to_its_factor(drawn, factors, share):
    shards = drawn(factors)

    assert len(shards) == 400 and shards.count(0) / 400 == pytest.approx(share, abs=0.07)
    others = [shards.count(number) for number in (1, 2, 3)]
    assert max(others) < 2 * min(others)


@pytest.mark.parametrize("factors", ["2", "1::2::3", "1::0", "1::x", "1::nan"])
def test_factors_that_do_not_fit_the_sources_are_refused(drawn, factors):
    with pytest.raises(ValueError, match=f"train_data_upsampling_factors: got '{factors}' for the 2 sources"):
        drawn(factors)


def test_factors_need_resampled_shards(drawn):
    with pytest.raises(ValueError, match="train_data_upsampling_factors='1::2' needs dataset_resampled"):
        drawn("1::2", dataset_resampled=False)
