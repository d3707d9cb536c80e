"""Files that appear whole or not at all."""

import resource
import signal
from multiprocessing import get_context

import pytest
import torch
from platforms import linux_only
from safetensors.torch import save_file

from clipup.atomic_files import replace_files

WRITERS = {
    "text": lambda path: path.write_text("a" * 4000),
    "safetensors": lambda path: save_file({"a": torch.zeros(1000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(1000)}, path),
}


def message_of(writer, path, pipe):
    """Of the error when no file may be larger than 1000 bytes, which fails as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        replace_files({path: WRITERS[writer]})
    except OSError as error:
        pipe.send(str(error))


@linux_only
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_is_named(tmp_path, writer):
    path = tmp_path / "model"
    path.write_text("before")
    ours, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=message_of, args=(writer, path, theirs))
    process.start()
    assert ours.poll(60) and f"{path} could not be written" in ours.recv()
    process.join()
    assert path.read_text() == "before"


def test_other_errors_of_a_writer_are_raised_as_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError):
        replace_files({tmp_path / "a": lambda path: 1 / 0})
    with pytest.raises(FileNotFoundError, match="'nowhere'"):
        replace_files({tmp_path / "a": lambda path: open("nowhere")})
