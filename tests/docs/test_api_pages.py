import re

import pytest
from documents import ROOT

import clipup
import clipup.evaluate
import clipup_kernels


@pytest.mark.parametrize(
    ("package", "page"), [(clipup, "clipup"), (clipup.evaluate, "clipup"), (clipup_kernels, "kernels")]
)
def test_every_public_name_is_in_the_reference(package, page):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text("utf-8")
    listed = re.findall(rf"^\.\. (?:auto|py:)\w+:: {package.__name__}\.(\w+)", text, re.MULTILINE)
    assert set(package.__all__) - {"reference"} <= set(listed)  # the reference holds the same functions again
