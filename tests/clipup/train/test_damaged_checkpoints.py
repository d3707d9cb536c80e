"""Damaged or unreadable checkpoints are reported by name, and never cause a silent start from the beginning."""

from __future__ import annotations

import pytest
import torch

from clipup.train import train


@pytest.fixture
def run(make_model, pairs, options):
    """Six steps in two epochs: epoch_1.pt, epoch_2.pt and epoch_latest.pt."""

    def run(**changes):
        return train(options(**changes), model=make_model(), loader=pairs())

    return run


def truncated(content):
    return content[: len(content) * 2 // 3]


def zeroed(content):
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def one_bit_flipped(content):
    """In the middle, where the tensors are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def marked_as_folder(content):
    """The bit of a record's entry in the archive's index after which torch reads memory that was never set."""
    entry = content.rindex(b"archive/data/20") - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    return content[: entry + 38] + bytes([content[entry + 38] | 0x10]) + content[entry + 39 :]


DAMAGES = [truncated, zeroed, one_bit_flipped, marked_as_folder, lambda content: b""]
IDS = ["truncated", "zeroed", "one bit", "folder bit", "empty"]


def damage(path, how):
    """Writes a new file, so that other names of the same bytes stay whole."""
    content = how(path.read_bytes())
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES, ids=IDS)
def test_a_damaged_checkpoint_is_detected_and_an_older_one_is_used_and_named(run, how, caplog):
    first = run()
    folder = first.directory / "checkpoints"
    for name in ("epoch_latest.pt", "epoch_2.pt"):
        damage(folder / name, how)

    with pytest.raises(ValueError, match="epoch_latest.pt"):
        run(resume=str(folder / "epoch_latest.pt"))
    resumed = run(resume="latest")

    said = [line for line in (first.directory / "out.log").read_text().splitlines() if "resumed from" in line]
    assert all("epoch_1.pt, because a checkpoint cannot be used" in line for line in said)
    assert any("epoch_2.pt" in line for line in said) and any("epoch_latest.pt" in line for line in said)
    assert "epoch_1.pt, because a checkpoint cannot be used" in caplog.text
    assert [record["step"] for record in resumed.history] == [1, 2, 3, 4, 5, 6]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_resume_is_refused_when_there_are_checkpoints_and_none_can_be_used(run):
    directory = run().directory
    for path in (directory / "checkpoints").iterdir():
        damage(path, truncated)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    with pytest.raises(ValueError, match="none can be used: .*epoch_1.pt"):
        run(resume="latest")

    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_file_that_cannot_be_read_now_is_neither_damaged_nor_missing(run):
    directory = run().directory
    latest = directory / "checkpoints" / "epoch_latest.pt"
    latest.unlink()
    latest.symlink_to(latest)  # reading it is an OSError, as on a file system that does not answer
    before = (directory / "metrics.jsonl").read_bytes()

    with pytest.raises(OSError, match="epoch_latest.pt"):
        run(resume="latest")
    latest.unlink()
    latest.symlink_to("/nowhere/epoch_latest.pt")  # on a disk that is not mounted
    with pytest.raises(OSError, match="epoch_latest.pt"):
        run(resume="latest")

    assert (directory / "metrics.jsonl").read_bytes() == before


def test_metrics_with_a_damaged_line_lose_only_that_line(run):
    directory = run(steps=4).directory
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\xff" + lines[1], *lines[2:]]) + b'\n{"step": 5, "lo')

    resumed = run(steps=6, resume="latest")

    assert [record["step"] for record in resumed.history] == [1, 3, 4, 5, 6]
