"""A run's directory is copied to another place while the run goes on; a copy that fails costs nothing."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from clipup.train.log.remote_sync import RemoteSync


def test_a_run_is_copied_and_another_run_does_not_begin_where_the_copy_is(run, tmp_path):
    copied = {"remote_sync": f"file://{tmp_path}/there"}
    here, there = run(**copied).directory, tmp_path / "there" / "run"
    names = {path.relative_to(here) for path in here.rglob("*") if path.is_file() and path.name != ".lock"}
    assert Path("checkpoints/epoch_latest.pt") in names
    assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} == names
    assert all(filecmp.cmp(here / name, there / name, shallow=False) for name in names - {Path("out.log")})

    here.rename(tmp_path / "lost")
    with pytest.raises(FileExistsError, match="holds the copy of a run"):
        run(resume="latest", **copied)
    (tmp_path / "lost").rename(here)
    assert run(resume="latest", epochs=4, **copied).steps == 12


def test_only_changed_files_are_copied_none_half_written_and_a_failed_copy_is_tried_again(tmp_path):
    here, there, reports = tmp_path / "run", tmp_path / "there", []
    here.mkdir()
    for name in ("a.pt", "b.jsonl", ".lock", ".writing.host.1.00000000.tmp"):
        (here / name).write_text("1")
    copier = RemoteSync(here, f"file://{there}", 1000, reports.append)

    there.write_text("a file where the directory should be")
    copier.copy()
    assert f"remote sync to file://{there} failed: " in reports[0]
    there.unlink()
    copier.copy()
    assert sorted(path.name for path in there.iterdir()) == ["a.pt", "b.jsonl"]
    (there / "a.pt").write_text("unchanged here")
    (here / "b.jsonl").write_text("12")
    copier.close()
    assert [(there / name).read_text() for name in ("a.pt", "b.jsonl")] == ["unchanged here", "12"]
