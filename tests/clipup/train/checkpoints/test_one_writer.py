"""One run per directory at a time; half-written files of a killed run are removed."""

from __future__ import annotations

import pytest

from clipup.locks import DirectoryInUse
from clipup.train import Every


@pytest.mark.parametrize("changes", [{"resume": "latest"}, {"force": True}], ids=str)
def test_a_run_in_use_is_refused_and_nothing_changes(run, tmp_path, changes):
    def second(model):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DirectoryInUse, match=r"run is in use by process .*--name"):
            run(**changes)
        assert sorted(tmp_path.rglob("*")) == before

    assert run([Every(3, second)], epochs=1).steps == 3


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_half_written_files_of_a_killed_run_are_removed(run, kind):
    root = run(epochs=1, fsdp_checkpoint=kind).directory
    places = [root, root / "checkpoints", root / "checkpoints" / "epoch_1"][: 2 + (kind == "sharded")]
    for place in places:
        (place / ".writing.elsewhere.1.00000000.tmp").mkdir()

    assert run(epochs=2, resume="latest", fsdp_checkpoint=kind).steps == 6
    assert not list(root.rglob(".writing*"))
