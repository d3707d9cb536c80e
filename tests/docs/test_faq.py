"""The messages quoted in the FAQ exist in the code; … replaces inserted values."""

import ast

import pytest
from documents import ROOT, blocks

HOLE = "…"
QUOTED = [line for block in blocks(ROOT / "docs" / "faq.md", "text") for line in block.text.splitlines()]


def literals():
    """All strings of both packages; f-strings have a hole for each expression."""
    for path in [ROOT / "setup.py", *ROOT.glob("clipup/**/*.py"), *ROOT.glob("clipup_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)


def says(literal, message):
    """Whether a literal contains the parts of a quoted message in their order."""
    start = 0
    for part in filter(None, map(str.strip, message.split(HOLE))):
        found = literal.find(part, start)
        if found < 0:
            return False
        start = found + len(part)
    return True


LITERALS = list(literals())


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_exists_in_the_code(message):
    assert any(says(literal, message) for literal in LITERALS)


def test_message_that_is_never_raised_is_found():
    assert len(QUOTED) > 20
    assert not any(says(literal, "… already holds a race (…)") for literal in LITERALS)
    assert not says("a … b", "b … a") and says("a … b", "a… b")
