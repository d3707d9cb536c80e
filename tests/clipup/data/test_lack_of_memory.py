"""Memory that runs out while data are read: an error that says so, and no unreadable sample or shard."""

from __future__ import annotations

import pytest
from picture_samples import preprocess, samples_of, tokenizer

from clipup.data import indexed, samples, streamed
from clipup.data.loaders import eval_samples, train_loader

KINDS = ("csv", "webdataset", "cached csv", "cached webdataset", "evaluation", "streamed")


def read(kind, source):
    """All samples."""
    if kind == "evaluation":
        return list(eval_samples(source, preprocess, max_skipped=1.0))
    options = {"train_num_samples": 24} if kind == "streamed" else {}
    source = f"file:{source}" if kind == "streamed" else source
    cache = "cached" in kind
    data = train_loader(source, preprocess, tokenizer, 3, 0, cache=cache, progress=False, max_skipped=1.0, **options)
    return samples_of(data.dataloader)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_for_which_memory_ran_out_is_not_skipped(pictures, monkeypatch, kind):
    def exhausted(*_):
        raise MemoryError

    for module in (indexed, samples, streamed):
        monkeypatch.setattr(module, "load_image", exhausted)
    with pytest.raises(MemoryError):
        read(kind, pictures.csv() if "csv" in kind else pictures.shards())
