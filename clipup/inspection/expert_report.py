"""``inspect_experts``: what the experts of a sparse model do with images and texts, as figures and as a page.

seen = clipup.inspection.inspect_experts(model, images, captions, preprocess=preprocess, tokenizer=tokenizer)
seen                                        # in a notebook: the table of layers
seen.routing(0)                             # which expert took which patch of picture 0
seen.similarity("visual.transformer.resblocks.3.mlp")
Path("report.html").write_text(seen.page(), encoding="utf-8")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from clipup_kernels import backend_info

from ..moe.layer import moe_layers
from .expert_similarity import Similarity, in_words, model_similarity
from .figures import expert_cards, svg
from .figures.charts import imbalance
from .figures.format import MISSING, count
from .figures.heatmaps import load_bars, similarity_heatmap
from .figures.images import expert_legend, patch, routing_map
from .figures.images import picture as whole_picture
from .figures.svg import Figure
from .figures.tables import Column, Table, as_html
from .figures.token_strip import token_strip
from .page import layer_title, template
from .routing_trace import NO_SPARSE_LAYERS, LayerRouting, route_images, route_texts
from .token_words import Piece, expert_words, pieces

if TYPE_CHECKING:
    from .expert_report import ExpertReport

_MAP_WIDTH, _CELL_WITH_NUMBER = 144, 14


_MAP_MARGIN = 14  # by which a map may shrink before it gets a row of its own


@dataclass(frozen=True)
class ExpertReport:
    """What ``inspect_experts`` saw. Its methods return figures, which notebooks show and files take as strings."""

    name: str
    pictures: list[Image.Image]
    """The images as the model saw them: resized and cropped."""
    captions: list[str]
    pieces: list[list[Piece]]
    """The tokens of every caption."""
    layers: dict[str, LayerRouting]
    """Sparse layers that saw something, by name; those of the image tower first."""
    similarities: dict[str, Similarity]
    """Of all sparse layers, by name."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Images that could not be read, and why."""

    def title(self, layer: str) -> str:
        """A layer's name for readers, "Image tower, block 3"."""
        return layer_title(layer, self.layers[layer].tower if layer in self.layers else None)

    def of_tower(self, tower: str) -> dict[str, LayerRouting]:
        """The layers of the "image" or the "text" tower."""
        return {name: layer for name, layer in self.layers.items() if layer.tower == tower}

    def table(self) -> Figure:
        """Every layer in numbers: load, entropy, similarity of its experts."""
        return Figure(as_html(self.overview(), "Load, entropy and similarity of every sparse layer"))

    def overview(self) -> Table:
        """The table of ``table`` as numbers in words."""
        routings = [self.layers.get(name) for name in self.similarities]
        alike = list(self.similarities.values())

        def column(group: str, label: str, of: Callable[[LayerRouting], str]) -> Column:
            return Column(group, label, tuple(MISSING if one is None else of(one) for one in routings))

        columns = [
            column("load", "tokens", lambda one: count(one.tokens)),
            column("load", "largest", lambda one: _decimals(imbalance(one.load), 2)),
            column("load", "unused", lambda one: count((one.load == 0).sum())),
            column("entropy, share of ln E", "a token", lambda one: _decimals(_of_most(one.token_entropy, one), 2)),
            column("entropy, share of ln E", "mean", lambda one: _decimals(_of_most(one.mean_entropy, one), 2)),
            _cosines("experts' cosine", "first", [one.first_mean for one in alike]),
            _cosines("experts' cosine", "second", [one.second_mean for one in alike]),
        ]
        if any(one.first_to_dense is not None for one in alike):
            columns += [
                _cosines("to the dense MLP", "first", [float(one.first_to_dense.mean()) for one in alike]),
                _cosines("to the dense MLP", "second", [float(one.second_to_dense.mean()) for one in alike]),
            ]
        return Table(tuple(map(self.title, self.similarities)), tuple(columns))

    def load(self, layer: str) -> Figure:
        """Share of the layer's choices that fell on each expert, and how sure its router is."""
        routing = self.layers[layer]
        most = math.log(routing.num_experts)
        sure = f"entropy of a token {_decimals(routing.token_entropy, 2)}, at most {most:.2f} nats"
        return load_bars(routing.load, self.title(layer), sure)

    def routing(self, picture: int) -> Figure:
        """A picture, and for every sparse layer of the image tower which expert took which of its patches."""
        image = self.pictures[picture]
        layers = {name: layer for name, layer in self.of_tower("image").items() if layer.grid is not None}
        width = max([_MAP_WIDTH, *(_CELL_WITH_NUMBER * layer.grid[1] for layer in layers.values())])
        shown = [("as the model sees it", whole_picture(image, f"picture {picture}", width))]
        for name, layer in layers.items():
            drawn = routing_map(image, layer.maps()[picture], self.title(name), width)
            shown.append((self.title(name).removeprefix("Image tower, "), drawn))
        return _side_by_side(shown, narrowest=width - _MAP_MARGIN)

    def tokens(self, caption: int) -> Figure:
        """A caption, once for every sparse layer of the text tower, its tokens in the colours of their experts."""
        strips = [
            token_strip(
                self.pieces[caption], layer.expert_indices[caption], self.title(name).removeprefix("Text tower, ")
            )
            for name, layer in self.of_tower("text").items()
        ]
        return Figure(svg.element("div", *strips, "", style="margin:0"))

    def similarity(self, layer: str) -> Figure:
        """Cosines between the experts' first matrices, and between their second ones, side by side."""
        alike, title, figures = self.similarities[layer], self.title(layer), []
        for which, cosines, to_dense in (
            ("first", alike.first, alike.first_to_dense),
            ("second", alike.second, alike.second_to_dense),
        ):
            figures.append(("", similarity_heatmap(cosines, f"{title}: {which}", to_dense, alike.granularity)))
        return _side_by_side(figures, narrowest=260)

    def cards(self, layer: str, most: int = 6) -> Figure:
        """What each expert of a layer takes most: patches by its probability, words beyond what its size explains."""
        routing = self.layers[layer]
        if routing.tower == "text":
            return expert_cards.word_cards(routing.first_load, expert_words(routing, self.pieces, most))
        patches = [self._patches(routing, expert, most) for expert in range(routing.num_experts)]
        return expert_cards.patch_cards(routing.first_load, patches)

    def page(self, shown: int = 6) -> str:
        """All of it as one self-contained HTML page, to be written as UTF-8; the first ``shown`` pictures and captions
        are shown whole."""
        return render_experts(self, shown)

    def __repr__(self) -> str:
        return f"<ExpertReport of {self.name}: {len(self.pictures)} images, {len(self.captions)} captions>"

    def _repr_html_(self) -> str:
        return str(self.table())

    def _patches(self, routing: LayerRouting, expert: int, most: int) -> list[Figure]:
        drawn = []
        for sample, token in routing.strongest(expert, most) if routing.grid else ():
            row, column = routing.patch_of(token)
            sure = routing.probabilities[sample, token, expert]
            name = f"picture {sample}, row {row}, column {column}: probability {sure:.2f}"
            drawn.append(patch(self.pictures[sample], routing.grid, row, column, name))
        return drawn


def inspect_experts(
    model: nn.Module,
    images: Iterable[Image.Image] = (),
    captions: Sequence[str] = (),
    *,
    preprocess: Callable[[Image.Image], Tensor] | None = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    dense: nn.Module | None = None,
    name: str = "model",
    batch_size: int = 32,
) -> ExpertReport:
    """Runs a sparse model over images and captions and keeps what its experts did. The model stays as it was.

    Args:
        images: PIL images, drawn as they are needed. preprocess: image to tensor [3, height, width], the model's own.
        captions: texts. tokenizer: the model's, from ``clipup.get_tokenizer``.
        dense: the model that was upcycled (or another of its architecture), to compare the experts with.
        name: of the model, for the page.

    Raises:
        ValueError: a dense model; neither images nor captions; images without preprocess or captions without
            tokenizer; a ``dense`` that is sparse or of another architecture.
    """
    if not moe_layers(model):
        raise ValueError(NO_SPARSE_LAYERS)
    similarities = model_similarity(model, dense)
    captions, kept = list(captions), []
    if preprocess is not None:
        layers = route_images(model, _prepared(images, preprocess, kept), batch_size)
    elif next(iter(images), None) is not None:
        raise ValueError("images need preprocess, the model's transform from image to tensor")
    else:
        layers = {}
    if not kept and not captions:
        raise ValueError("there is nothing to look at: images and captions are both empty")
    split: list[list[Piece]] = []
    if captions:
        if tokenizer is None:
            raise ValueError("captions need tokenizer, as clipup.get_tokenizer makes it")
        tokens = tokenizer(captions)
        split = [pieces(tokenizer, row) for row in tokens.tolist()]
        layers |= route_texts(model, tokens, batch_size)
    return ExpertReport(name, kept, captions, split, layers, similarities)


def _prepared(
    images: Iterable[Image.Image], preprocess: Callable[[Image.Image], Tensor], kept: list[Image.Image]
) -> Iterator[Tensor]:
    """Tensors for the model, one an image; what the model sees of it is added to ``kept``."""
    for image in images:
        tensor = preprocess(image)
        kept.append(_as_seen(tensor, preprocess))
        yield tensor


def _as_seen(tensor: Tensor, preprocess: Any) -> Image.Image:
    """A preprocessed image [3, height, width] as a picture, without the normalisation that the transform ends in."""
    last = getattr(preprocess, "transforms", [None])[-1]
    if hasattr(last, "mean") and hasattr(last, "std"):
        mean, std = (tensor.new_tensor(values).view(-1, 1, 1) for values in (last.mean, last.std))
        tensor = tensor * std + mean
    pixels = (255 * tensor.float().clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _side_by_side(figures: Sequence[tuple[str, str]], narrowest: int) -> Figure:
    """Figures in as many columns as there is room for, their names below."""
    cells = [
        svg.element("div", figure, *([svg.element("small", name, style="opacity:.75")] if name else []))
        for name, figure in figures
    ]
    grid = f"display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,{narrowest}px),1fr));gap:8px 12px"
    return Figure(svg.element("div", *cells, style=grid))


def _cosines(group: str, label: str, values: Sequence[float]) -> Column:
    return Column(group, label, tuple(_decimals(value, 3) for value in values))


def _of_most(entropy: float, routing: LayerRouting) -> float:
    """An entropy as a share of the largest that there can be; NaN for a single expert."""
    most = math.log(routing.num_experts)
    return entropy / most if most else math.nan


def _decimals(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else MISSING


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
        legend=expert_legend(max((one.num_experts for one in report.layers.values()), default=0)),
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
