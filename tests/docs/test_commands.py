"""The commands that README and docs show are commands: their options parse, their targets and programs are there."""

import ast
import importlib.util
import re
import shlex

import pytest
from documents import PAGES, ROOT, blocks, inline_code, name

from clipup import cli


class Parsed(Exception):
    """The arguments were parsed, and nothing was done with them yet."""


def commands(page):
    """The command lines of a page as words, without comments, line breaks and variables in front. In the text, those
    with options and nothing left out."""
    whole = [
        code for code in inline_code(page) if re.fullmatch(r"clipup [^|\[]* --[^|\[]*", code) and "..." not in code
    ]
    lines = [line for block in blocks(page, "bash") for line in block.text.replace("\\\n", " ").splitlines()]
    for line in [*lines, *whole]:
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words:
            yield words


def clipup_commands(page):
    for words in commands(page):
        if words[0] == "clipup":
            yield words[1:]
        elif words[0] in ("python", "torchrun") and "clipup" in words:
            yield [word for word in words[words.index("clipup") + 1 :] if word != "--"]


SHOWN = [(name(page), words) for page in PAGES for words in clipup_commands(page)]


@pytest.fixture
def parses(monkeypatch):
    """Whether ``clipup`` takes these arguments, up to the point where it would begin."""

    def only(parse):
        def stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return stop

    for place in ("tyro.cli", "clip_benchmark.cli.get_parser_args"):
        module, function = place.rsplit(".", 1)
        monkeypatch.setattr(place, only(getattr(importlib.import_module(module), function)))

    def try_it(arguments):
        try:
            return cli.main(arguments) == 0
        except Parsed:
            return True
        except SystemExit as stop:
            return stop.code == 0

    return try_it


@pytest.mark.parametrize(
    "arguments", [words for _, words in SHOWN], ids=[f"{page}: {' '.join(w)}" for page, w in SHOWN]
)
def test_command_parses(arguments, parses):
    assert parses(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "upcycle ViT-B-16",
        "train --no-such-option 1",
        "eval model",
        "study run",
        "benchmark eval --model_type no-such-type",
    ],
)
def test_commands_that_would_fail_are_told_apart(arguments, parses):
    assert not parses(arguments.split())


def test_readme_shows_every_command_and_the_guide_is_read():
    shown = {words[0] for page, words in SHOWN if page == "README.md"}
    assert shown == set(cli.COMMANDS) - {"demo"}  # which is `make demo` there
    assert {"data", "train", "doctor", "flops", "upcycle", "eval", "report"} <= {
        words[0] for page, words in SHOWN if page == "docs/guide.md"
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_targets_and_programs_are_there(page):
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in [*commands(page), *(code.split() for code in inline_code(page) if code.startswith("make "))]:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_are_python_and_name_what_is_there(page):
    for block in blocks(page, "python"):
        ast.parse(block.text)
        for package, attribute in re.findall(r"\b(clipup|clipup_kernels)\.(\w+)", block.text):
            module = importlib.import_module(package)
            assert hasattr(module, attribute) or importlib.util.find_spec(f"{package}.{attribute}"), attribute
