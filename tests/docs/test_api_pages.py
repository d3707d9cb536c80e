import re

import pytest
from documents import ROOT

import clipup
import clipup_kernels

PACKAGES = (clipup, clipup.evaluate, clipup.inspection, clipup.plan, clipup.search, clipup.train)


@pytest.mark.parametrize(("package", "page"), [*((one, "clipup") for one in PACKAGES), (clipup_kernels, "kernels")])
def test_every_public_name_is_in_the_reference(package, page):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text("utf-8")
    listed = re.findall(rf"^\.\. (?:auto|py:)\w+:: {package.__name__}\.(\w+)", text, re.MULTILINE)
    assert set(package.__all__) - {"reference"} <= set(listed)  # the reference holds the same functions again
