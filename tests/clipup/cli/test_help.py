"""The help of each command, on a terminal of 80 columns."""

import re
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from itertools import pairwise

import pytest

from clipup.cli import COMMANDS, main

WIDTH, IN_A_BOX = 80, 76
OWN = [[command] for command in COMMANDS if command != "data"]  # whose help is that of its commands
OWN += [["data", "pictograms"], ["data", "pairs"]]


@pytest.fixture
def shown(monkeypatch):
    """The lines of a command's help."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def lines(*command):
        printed = BytesIO()
        with redirect_stdout(TextIOWrapper(printed, "utf-8")) as out:
            try:
                assert main([*command, "--help"]) == 0
            except SystemExit as stop:
                assert not stop.code
            out.flush()
            return printed.getvalue().decode().splitlines()

    return lines


@pytest.mark.parametrize("command", [*OWN, [], ["data"]], ids=" ".join)
def test_lines_fit_the_terminal_and_hold_as_many_words_as_fit(shown, command):
    text = shown(*command)
    assert not [line for line in text if "\t" in line or len(line) > WIDTH and not line.startswith("usage: ")]
    boxed = [line[2:-2].rstrip() if line.startswith("│") else "" for line in text]
    for line, following in pairwise(boxed):
        starts = {len(each) - len(each.lstrip()) for each in (line, following)}
        if following and len(starts) == 1 and min(starts) > 0:
            assert len(f"{line} {following.split()[0]}") > IN_A_BOX, line


def flags(text):
    return re.findall(r"^│ (--[a-z0-9-]+)", "\n".join(text), re.MULTILINE)


def test_the_help_of_train_opens_with_the_options_that_most_runs_need(shown):
    first = "model pretrained moe train-data val-data batch-size lr steps precision name"
    named = flags(shown("train"))
    assert named[:10] == [f"--{name}" for name in first.split()] and len(named) == len(set(named))


def test_the_help_of_plan_opens_with_the_model(shown):
    assert flags(shown("plan"))[0] == "--model"


@pytest.mark.parametrize("command", OWN, ids=" ".join)
def test_examples_in_the_help_can_be_copied_from_the_terminal(shown, command):
    paragraphs = "\n".join(shown(*command)).split("\n\n")
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("Example: clipup ")]
    assert examples and not any(re.search(r"[^\\]\n", example) for example in examples)
