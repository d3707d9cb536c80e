"""``python -m studies``."""

from __future__ import annotations

from small_icons import SETS

from studies import cli
from studies.icon_data.build import Sets


def test_the_command_builds_it_and_says_what_it_left_out(make_package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sets, "read", classmethod(lambda cls: SETS))
    package = make_package()

    arguments = ["--package", str(package), "--processes", "1", "--test-drawings"]
    code = cli.main(["icons", str(tmp_path / "out"), *arguments])

    said = capsys.readouterr().out
    assert code == 0 and (tmp_path / "out" / "dataset.json").is_file()
    assert "test_styles" in said and "test_drawings" in said and "near-duplicates" in said
