"""``python -m studies``."""

from pathlib import Path

from small_icons import SETS

from studies import cli
from studies.icon_data.build import Sets


def test_the_command_builds_the_icons_and_reports_what_was_left_out(make_package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sets, "read", classmethod(lambda cls: SETS))
    arguments = ["--package", str(make_package()), "--processes", "1", "--test-drawings"]
    assert cli.main(["icons", str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "test_styles" in said and "test_drawings" in said and "near-duplicates" in said


def test_runs_that_have_a_log_are_done_and_a_pattern_that_names_none_is_refused(capsys):
    study = str(Path(__file__).parents[2] / "studies" / "icons")
    assert cli.main(["run", study, "--data", "d", "--runs", "r"]) == 0
    assert "[85/85] dense_equal_flops-9862-lr0.004-s4" in capsys.readouterr().out
    assert cli.main(["run", study, "*-lr0.016-*", "--data", "d", "--runs", "r"]) != 0
    assert "*-lr0.016-*" in capsys.readouterr().err
