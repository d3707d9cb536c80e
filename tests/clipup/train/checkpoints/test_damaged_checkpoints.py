"""Damaged checkpoints of either kind are reported by name, and never cause a silent start from the beginning; nothing
in them is executed."""

import pickle
import re
import shutil

import pytest
import torch
from same_runs import contents
from strangers import MakesFile

from clipup.cli import main


def truncated(content):
    return content[: len(content) * 2 // 3]


def one_bit_flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def marked_as_folder(content):
    """The bit of a record's entry in the archive's index after which torch reads memory that was never set."""
    entry = content.rindex(b"archive/data/20") - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    return content[: entry + 38] + bytes([content[entry + 38] | 0x10]) + content[entry + 39 :]


def removed(content):
    return None


DAMAGES = [
    *(("epoch_2.pt", how) for how in (truncated, one_bit_flipped, marked_as_folder)),
    *(("epoch_2/*.safetensors", how) for how in (truncated, one_bit_flipped, removed)),
    *(("epoch_2/index.json", how) for how in (one_bit_flipped, removed)),
    *(("epoch_2/state.pt", how) for how in (one_bit_flipped, removed)),
]


@pytest.fixture(scope="module")
def finished():
    """Directories and weights of finished runs by kind."""
    return {}


@pytest.fixture
def run_of(run, finished, tmp_path, tmp_path_factory):
    """A run of two epochs of a kind; ``run_of.make`` gives the directory of a finished one, to be damaged, and its
    weights."""

    def run_of(kind, **changes):
        return run(**{"epochs": 2, "fsdp_checkpoint": kind, **changes})

    def make(kind):
        if kind not in finished:
            result = run_of(kind)
            finished[kind] = tmp_path_factory.mktemp(kind) / "run", result.model.state_dict()
            result.directory.rename(finished[kind][0])
            (finished[kind][0] / "checkpoints" / "epoch_latest.pt").unlink(missing_ok=True)  # the same as epoch_2.pt
        return shutil.copytree(finished[kind][0], tmp_path / "logs" / "run"), finished[kind][1]

    run_of.make = make
    return run_of


@pytest.mark.parametrize(("files", "how"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run_of, files, how, caplog):
    kind = "full" if files.endswith("2.pt") else "sharded"
    directory, weights = run_of.make(kind)
    [path] = (directory / "checkpoints").glob(files)
    content = how(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ValueError, match="epoch_2"):
        run_of(kind, resume=str(directory / "checkpoints" / files.partition("/")[0]))
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "cut o')
    resumed = run_of(kind, resume="latest")

    said = "epoch_1(.pt)?, because a checkpoint cannot be used: .*epoch_2"
    assert re.search(said, caplog.text)
    assert [record["step"] for record in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_resume_is_refused_when_there_are_checkpoints_and_none_can_be_used(run_of, kind):
    directory, _ = run_of.make(kind)
    for path in (directory / "checkpoints").rglob("*.pt"):
        path.write_bytes(truncated(path.read_bytes()))
    before = contents(directory)

    with pytest.raises(ValueError, match="none can be used: .*epoch_1"):
        run_of(kind, resume="latest")

    log = directory / "out.log"
    assert {**contents(directory), log: b""} == {**before, log: b""}


@pytest.mark.parametrize("file", ["epoch_2/state.pt", "epoch_2/more.safetensors", "epoch_2/index.json", "epoch_2.pt"])
def test_nothing_in_a_checkpoint_is_executed(run_of, tmp_path, file, capsys):
    kind = "full" if file.endswith("2.pt") else "sharded"
    directory, _ = run_of.make(kind)
    (directory / "checkpoints" / file).write_bytes(pickle.dumps({"epoch": 1, "x": MakesFile(tmp_path / "executed")}))
    path = directory / "checkpoints" / file.partition("/")[0]

    with pytest.raises(ValueError, match="epoch_2"):
        run_of(kind, resume=str(path))
    main(["convert", str(path), str(tmp_path / "converted")])

    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("files", ["epoch_2.pt", "epoch_2/*.safetensors"])
def test_a_checkpoint_that_a_failing_disk_does_not_give_is_named(run_of, files):
    kind = "full" if files.endswith("2.pt") else "sharded"
    directory, _ = run_of.make(kind)
    [path] = (directory / "checkpoints").glob(files)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # can be opened; its first read is an I/O error

    with pytest.raises(OSError, match=f"Input/output error: .*{path.name}"):
        run_of(kind, resume="latest")
