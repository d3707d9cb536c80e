"""The commands in README and docs exist: options parse, make targets and programs are found."""

import ast
import importlib.util
import re
from functools import partial

import pytest
import tyro
from documents import PAGES, ROOT, blocks, commands, commands_of, inline_code, name

import clipup.cli
import studies.cli

MAINS = {"clipup": clipup.cli.main, "studies": studies.cli.main}
SHOWN = {(program, *words): page for page in PAGES for program in MAINS for words in commands_of(page, program)}


class Parsed(Exception):
    """The arguments were parsed; nothing has run yet."""


@pytest.fixture
def parses(monkeypatch):
    """Whether a program accepts these arguments, up to the point where it would begin."""

    def only(parse, *args, **kwargs):
        options = parse(*args, **kwargs)
        if hasattr(options, "check"):
            options.check()
        raise Parsed

    monkeypatch.setattr(tyro, "cli", partial(only, tyro.cli))

    def try_it(program, *arguments):
        try:
            return MAINS[program](list(arguments)) == 0
        except Parsed:
            return True
        except SystemExit as stop:
            return stop.code == 0

    return try_it


@pytest.mark.parametrize("command", SHOWN, ids=" ".join)
def test_command_parses(command, parses):
    assert parses(*command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_targets_and_programs_exist(page):
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in [*commands(page), *(code.split() for code in inline_code(page) if code.startswith("make "))]:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words
        if words[0] == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2]), words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_are_python_and_name_what_exists(page):
    for block in blocks(page, "python"):
        ast.parse(block.text)
        for package, attribute in re.findall(r"\b(clipup|clipup_kernels)\.(\w+)", block.text):
            module = importlib.import_module(package)
            assert hasattr(module, attribute) or importlib.util.find_spec(f"{package}.{attribute}"), attribute
