"""Shared by the HTML pages: their templates, and readable names of sparse layers."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from .figures.format import count, percent
from .figures.palette import expert_color, is_second_eight
from .figures.svg import pixels, shorten


@cache
def template(name: str, package: str = __package__) -> Template:
    """A template of ``package`` or of ``clipup.inspection``; values are escaped unless they are markup."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent, "shorten": shorten, "px": pixels}
    environment.globals |= {"color": expert_color, "is_second_eight": is_second_eight}
    return environment.get_template(name)


def layer_title(name: str, tower: str | None = None) -> str:
    """A sparse layer's readable name: ``visual.transformer.resblocks.3.mlp`` is "Image tower, block 3".

    tower: "image" or "text"; None takes it from the name, which also identifies a CoCa's decoder.
    """
    blocks = re.findall(r"\.(\d+)(?=\.|$)", f".{name}")
    if not blocks:
        return name
    if tower is None:
        tower = "image" if name.startswith("visual") else "decoder" if name.startswith("text_decoder") else "text"
    called = "Decoder" if tower == "decoder" else f"{tower.capitalize()} tower"
    return f"{called}, block {'.'.join(blocks)}"
