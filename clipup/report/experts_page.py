"""The page of ``clipup report``: what the experts of a model do, in one HTML file that loads and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clipup_kernels import backend_info

from ..similarity import Similarity, in_words
from . import pictures, svg
from .charts import imbalance
from .numbers import count
from .page import template

if TYPE_CHECKING:
    from .experts import ExpertReport

_MOST_SKIPPED = 20
_NARROW = 2  # maps beside a picture that leave room for another picture
_TOWERS = ("image", "text")


def render_experts(report: ExpertReport, shown: int = 6) -> str:
    """The page as a string, to be written as UTF-8; all text escaped.

    Args:
        report: what was seen.
        shown: pictures and captions that are shown whole, the first ones.

    Raises:
        ValueError: ``shown`` is negative.
    """
    if shown < 0:
        raise ValueError(f"shown must be 0 or more pictures and captions, got {shown}")
    has_maps = any(layer.grid is not None for layer in report.of_tower("image").values())
    captions = report.captions[:shown] if report.of_tower("text") else []
    page = template("experts.html.j2").render(
        name=report.name,
        statements=statements(report),
        images=len(report.pictures),
        captions=len(report.captions),
        table=report.table(),
        narrow_maps=sum(layer.grid is not None for layer in report.layers.values()) <= _NARROW,
        has_dense=any(one.first_to_dense is not None for one in report.similarities.values()),
        loads=[report.load(name) for name in report.layers],
        legend=pictures.expert_legend(max((one.num_experts for one in report.layers.values()), default=0)),
        maps=[report.routing(index) for index in range(min(shown, len(report.pictures)))] if has_maps else [],
        tokens=[report.tokens(index) for index in range(len(captions))],
        similarities=[report.similarity(name) for name in report.similarities],
        cards=[(report.title(name), layer.tower, report.cards(name)) for name, layer in report.layers.items()],
        skipped=list(report.skipped.items())[:_MOST_SKIPPED],
        skipped_count=len(report.skipped),
        version=backend_info()["version"],
    )
    return svg.clean(page)


def statements(report: ExpertReport) -> list[str]:
    """What there is to say about the experts in a sentence each: how similar they are, and whether all are used."""
    found = [
        f"{_plural(len(report.similarities), 'sparse layer')}, seen with {_plural(len(report.pictures), 'image')} and "
        f"{_plural(len(report.captions), 'caption')}."
    ]
    similarities = [_similarity(report, tower) for tower in _TOWERS]
    found.append(" ".join(sentence for sentence in similarities if sentence))
    if report.layers:
        busiest = max(report.layers, key=lambda name: imbalance(report.layers[name].load))
        unused = {name: int((layer.load == 0).sum()) for name, layer in report.layers.items()}
        words = (
            f"{_plural(sum(unused.values()), 'expert')} took nothing at all"
            if any(unused.values())
            else "Every expert took something"
        )
        largest = imbalance(report.layers[busiest].load)
        found.append(f"{words}; the busiest takes {largest:.2f} times its even share ({report.title(busiest)}).")
    return [sentence for sentence in found if sentence]


def _similarity(report: ExpertReport, tower: str) -> str:
    prefix = f"{tower.capitalize()} tower"
    alike: Mapping[str, Similarity] = {
        name: one for name, one in report.similarities.items() if report.title(name).startswith(prefix)
    }
    means = [one.first_mean for one in alike.values() if math.isfinite(one.first_mean)]
    if not means:
        return ""
    low, high = min(means), max(means)
    lie = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
    least, most = in_words(low), in_words(high)
    judged = f"are {most}" if least == most else f"range from {most} to {least}"
    return f"The experts of the {tower} tower {judged}: mean cosine between two experts' first matrices {lie}."


def _plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"
