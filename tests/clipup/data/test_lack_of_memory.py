"""Memory that runs out while data are read: an error that says so, and no unreadable sample or shard."""

from __future__ import annotations

import errno
import io
import os

import pytest
from picture_samples import preprocess, samples_of, tokenizer

from clipup.data import indexed_batches, sample_index, shard_index, webdataset_pipeline
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

    for module in (indexed_batches, sample_index, webdataset_pipeline):
        monkeypatch.setattr(module, "load_image", exhausted)
    with pytest.raises(ValueError, match=r"cannot read .*(png|tar).*: memory ran out: free memory, use fewer workers"):
        read(kind, pictures.csv() if "csv" in kind else pictures.shards())


def exhaust(patched, error):
    """From the third read on, files raise this error."""

    class File(io.FileIO):
        reads = 0

        def read(self, size=-1):
            self.reads += 1
            if self.reads > 3:
                raise error
            return super().read(size)

    for module in (shard_index, sample_index):
        patched.setattr(module, "open", lambda path, mode: File(path), raising=False)
    patched.setattr(webdataset_pipeline, "open_shard", lambda shard: File(shard.removeprefix("file:")))


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))])
@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "evaluation", "streamed"])
def test_a_shard_for_which_memory_ran_out_is_not_damaged(pictures, monkeypatch, kind, error):
    source = pictures.shards()
    exhaust(monkeypatch, error)
    with pytest.raises(ValueError, match=r"cannot read .*train-\d+\.tar: (memory ran out|Cannot allocate memory): "):
        read(kind, source)


def test_no_index_is_kept_of_a_shard_for_which_memory_ran_out(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "_KEPT_FROM_SECONDS", -1)
    source = pictures.shards()
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="memory ran out"):
        exhaust(patched, MemoryError())
        read("webdataset", source)
    assert sorted(picture for picture, _, _ in read("webdataset", source)) == list(range(24))


def test_a_reason_is_never_empty(pictures, monkeypatch):
    def failing(shard):
        raise AssertionError

    monkeypatch.setattr(webdataset_pipeline, "open_shard", failing)
    with pytest.raises(ValueError, match=r"it cannot be opened \(AssertionError\)"):
        read("streamed", pictures.shards())
