"""``look``: what the experts of a sparse model do with images and texts, as figures and as a page.

seen = clipup.report.look(model, images, captions, preprocess=preprocess, tokenizer=tokenizer)
seen                                        # in a notebook: the table of layers
seen.routing(0)                             # which expert took which patch of picture 0
seen.similarity("visual.transformer.resblocks.3.mlp")
Path("report.html").write_text(seen.page(), encoding="utf-8")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ..moe import moe_layers
from ..similarity import Similarity, model_similarity
from . import cards, pictures, svg
from .charts import imbalance
from .experts_page import render_experts
from .matrices import load_bars, similarity_heatmap
from .numbers import MISSING, count
from .observe import NO_SPARSE_LAYERS, LayerRouting, route_images, route_texts
from .page import layer_title
from .svg import Figure
from .tables import Column, Table, as_html
from .tokens import token_strip
from .words import Piece, expert_words, pieces

_MAP_WIDTH, _CELL_WITH_NUMBER = 144, 14
_MAP_MARGIN = 14  # by which a map may shrink before it gets a row of its own


@dataclass(frozen=True)
class ExpertReport:
    """What ``look`` saw. Methods draw it: each returns a figure, which notebooks show and files take as a string."""

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
        shown = [("as the model sees it", pictures.picture(image, f"picture {picture}", width))]
        for name, layer in layers.items():
            drawn = pictures.routing_map(image, layer.maps()[picture], self.title(name), width)
            shown.append((self.title(name).removeprefix("Image tower, "), drawn))
        return _side_by_side(shown, narrowest=width - _MAP_MARGIN)

    def tokens(self, caption: int) -> Figure:
        """A caption, once for every sparse layer of the text tower, its tokens in the colours of their experts."""
        strips = [
            token_strip(self.pieces[caption], layer.experts[caption], self.title(name).removeprefix("Text tower, "))
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
            return cards.word_cards(routing.first_load, expert_words(routing, self.pieces, most))
        patches = [self._patches(routing, expert, most) for expert in range(routing.num_experts)]
        return cards.patch_cards(routing.first_load, patches)

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
            drawn.append(pictures.patch(self.pictures[sample], routing.grid, row, column, name))
        return drawn


def look(
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
