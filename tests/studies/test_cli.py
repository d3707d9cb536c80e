"""``python -m studies``."""

from small_icons import SETS

from studies import cli
from studies.icon_data.build import Sets


def test_the_command_builds_it_and_says_what_it_left_out(make_package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sets, "read", classmethod(lambda cls: SETS))
    arguments = ["--package", str(make_package()), "--processes", "1", "--test-drawings"]
    assert cli.main(["icons", str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "test_styles" in said and "test_drawings" in said and "near-duplicates" in said
