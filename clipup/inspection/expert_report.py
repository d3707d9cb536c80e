"""``inspect_experts``: how a sparse model's experts are used on images and texts, as figures and as a page.

seen = clipup.inspection.inspect_experts(model, images, captions, preprocess=preprocess, tokenizer=tokenizer)
seen                                        # in a notebook: the table of layers
seen.routing(0)                             # the expert of each patch of image 0
seen.similarity("visual.transformer.resblocks.3.mlp")
Path("experts.html").write_text(seen.page(), encoding="utf-8")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from clipup_kernels import backend_info

from ..clip.inputs import CheckedTokenizer
from ..inference.prepared import quantization
from .expert_similarity import EQUAL, Similarity, in_words, model_similarity
from .figures import svg
from .figures.charts import imbalance
from .figures.format import MISSING, count
from .figures.heatmaps import load_bars, similarity_heatmap
from .figures.html import html
from .figures.images import MOST_CAPTION_CHARACTERS, expert_legend, map_width, patch, routing_map
from .figures.images import picture as whole_picture
from .figures.svg import Figure
from .figures.tables import Column, Table, as_html
from .figures.token_strip import token_strip
from .page import layer_title, template
from .routing_trace import LayerRouting, route_images, route_texts
from .token_words import PADDING, Piece, expert_words, pieces

_MAP_MARGIN = 14  # px by which a map may shrink before the row wraps
_MOST_SKIPPED = 20
_NARROW = 2  # maps per image that leave room for a second image beside it
_TOWERS = ("image", "text")


@dataclass(frozen=True)
class ExpertReport:
    """The result of ``inspect_experts``. Its methods return figures: strings that notebooks display."""

    name: str
    pictures: list[Image.Image]
    """The images as the model saw them: resized and cropped."""
    captions: list[str]
    pieces: list[list[Piece]]
    """The tokens of every caption."""
    layers: dict[str, LayerRouting]
    """Routing of the sparse layers that were run, by name; the image tower's first."""
    similarities: dict[str, Similarity]
    """Similarity of the experts of every sparse layer, by name."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Images that could not be read, with the reason."""
    labels: list[str] = field(default_factory=list)
    """What is written above each picture, such as its file name and caption; empty: nothing."""
    steps: int | None = None
    """Steps that the model was trained; None: not known."""

    def title(self, layer: str) -> str:
        """A layer's readable name, "Image tower, block 3"."""
        return layer_title(layer, self.layers[layer].tower if layer in self.layers else None)

    def of_tower(self, tower: str) -> dict[str, LayerRouting]:
        """The layers of the "image" or the "text" tower."""
        return {name: layer for name, layer in self.layers.items() if layer.tower == tower}

    def table(self) -> Figure:
        """The table of layers: load, entropy and similarity of their experts."""
        return as_html(self.overview(), "Load, entropy and similarity of every sparse layer")

    def overview(self) -> Table:
        """The cells of ``table``, formatted."""
        routings = [self.layers.get(name) for name in self.similarities]
        layers = list(self.similarities.values())

        def column(group: str, label: str, of: Callable[[LayerRouting], str]) -> Column:
            return Column(group, label, tuple(MISSING if routing is None else of(routing) for routing in routings))

        columns = [
            column("load", "tokens", lambda layer: count(layer.tokens)),
            column("load", "largest", lambda layer: _decimals(imbalance(layer.load), 2)),
            column("load", "unused", lambda layer: count((layer.load == 0).sum())),
            column("entropy, share of ln E", "per token", lambda layer: _share(layer.token_entropy, layer)),
            column("entropy, share of ln E", "mean", lambda layer: _share(layer.mean_entropy, layer)),
            _cosines("experts' cosine", "first", [layer.first_mean for layer in layers]),
            _cosines("experts' cosine", "second", [layer.second_mean for layer in layers]),
        ]
        if any(layer.first_to_dense is not None for layer in layers):
            columns += [
                _cosines("to the dense MLP", "first", [float(layer.first_to_dense.mean()) for layer in layers]),
                _cosines("to the dense MLP", "second", [float(layer.second_to_dense.mean()) for layer in layers]),
            ]
        return Table(tuple(map(self.title, self.similarities)), tuple(columns))

    def load(self, layer: str) -> Figure:
        """Each expert's share of the layer's choices, and the entropy of its router."""
        routing = self.layers[layer]
        entropy = f"entropy per token: {_share(routing.token_entropy, routing)} of ln {routing.num_experts}"
        longest = max(float(other.load.max()) for other in self.layers.values())
        return load_bars(routing.load, self.title(layer), entropy, longest)

    def routing(self, picture: int) -> Figure:
        """An image, and for every sparse layer of the image tower a map of its patches' experts."""
        image = self.pictures[picture]
        layers = self.of_tower("image").items()
        maps = {name: layer.maps()[picture] for name, layer in layers if layer.grid is not None}
        width = map_width(max((len(experts[0]) for experts in maps.values()), default=0))
        shown = [("input", whole_picture(image, self._label(picture), width))]
        shown += [
            (self.title(name).removeprefix("Image tower, "), routing_map(image, experts, self.title(name), width))
            for name, experts in maps.items()
        ]
        maps_of_layers = html("side_by_side", figures=shown, narrowest=width - _MAP_MARGIN)
        if not self.labels:
            return maps_of_layers
        label = svg.shorten(self.labels[picture], MOST_CAPTION_CHARACTERS)
        return html("labelled", label=label, figure=maps_of_layers)

    def tokens(self, caption: int) -> Figure:
        """A caption for every sparse layer of the text tower, each token in its expert's color."""
        strips = []
        for name, layer in self.of_tower("text").items():
            routed = zip(self.pieces[caption], layer.mask[caption], strict=True)
            shown = [piece if is_routed else piece._replace(word=PADDING) for piece, is_routed in routed]
            title = self.title(name).removeprefix("Text tower, ")
            strips.append(token_strip(shown, layer.expert_indices[caption], title))
        return Figure(svg.element("div", *strips, "", style="margin:0"))

    def similarity(self, layer: str) -> Figure:
        """Heatmaps of the cosines between the experts' first and between their second matrices, in shades that fit the
        cosines of all layers; one line if all are equal."""
        cosines, title = self.similarities[layer], self.title(layer)
        if cosines.granularity == 1 and in_words(cosines.first_mean) == in_words(cosines.second_mean) == EQUAL:
            line = f"the {len(cosines.first)} experts are equal, still copies of one dense MLP."
            return Figure(svg.element("div", svg.element("strong", f"{escape(svg.clean(title))}:"), f" {line}"))
        least = min(float(between.min()) for layer in self.similarities.values() for between in layer[:2])
        lightest = min(0.99, max(0.0, math.floor(100 * least) / 100))
        scale = cosines.granularity, lightest
        first = similarity_heatmap(cosines.first, f"{title}: first", cosines.first_to_dense, *scale)
        second = similarity_heatmap(cosines.second, f"{title}: second", cosines.second_to_dense, *scale)
        return html("side_by_side", figures=[("", first), ("", second)], narrowest=260)

    def cards(self, layer: str, most: int = 6) -> Figure:
        """What each expert of a layer is chosen for most: patches by probability, words beyond its load."""
        routing = self.layers[layer]
        if routing.tower == "image" and routing.grid is None:
            return Figure(svg.element("small", "the grid of this layer’s patches is not known"))
        if routing.tower == "text":
            words = expert_words(routing, self.pieces, most)
            return html("word_cards", experts=list(zip(routing.first_load, words, strict=True)))
        patches = [self._patches(routing, expert, most) for expert in range(routing.num_experts)]
        return html("patch_cards", experts=list(zip(routing.first_load, patches, strict=True)))

    def page(self, shown: int = 6) -> str:
        """All figures as one HTML page (write it as UTF-8), with the first ``shown`` images and captions."""
        has_maps = any(layer.grid is not None for layer in self.of_tower("image").values())
        captions = self.captions[:shown] if self.of_tower("text") else []
        page = template("experts.html.j2").render(
            name=self.name,
            statements=statements(self),
            images=len(self.pictures),
            captions=len(self.captions),
            table=self.table(),
            narrow_maps=sum(layer.grid is not None for layer in self.layers.values()) <= _NARROW,
            has_dense=any(layer.first_to_dense is not None for layer in self.similarities.values()),
            loads=[self.load(name) for name in self.layers],
            legend=expert_legend(max((layer.num_experts for layer in self.layers.values()), default=0)),
            has_maps=has_maps,
            maps=[self.routing(index) for index in range(min(shown, len(self.pictures)))] if has_maps else [],
            has_text_layers=bool(self.of_tower("text")),
            tokens=[self.tokens(index) for index in range(len(captions))],
            similarities=[self.similarity(name) for name in self.similarities],
            cards=[(self.title(name), layer.tower, self.cards(name)) for name, layer in self.layers.items()],
            skipped=list(self.skipped.items())[:_MOST_SKIPPED],
            skipped_count=len(self.skipped),
            version=backend_info()["version"],
        )
        return svg.clean(page)

    def __repr__(self) -> str:
        return f"<ExpertReport of {self.name}: {len(self.pictures)} images, {len(self.captions)} captions>"

    def _repr_html_(self) -> str:
        return str(self.table())

    def _label(self, picture: int) -> str:
        return self.labels[picture] if self.labels else f"picture {picture}"

    def _patches(self, routing: LayerRouting, expert: int, most: int) -> list[Figure]:
        assert routing.grid is not None
        drawn = []
        for sample, token in routing.strongest(expert, most):
            row, column = routing.patch_of(token)
            probability = routing.probabilities[sample, token, expert]
            name = f"{self._label(sample)}, row {row}, column {column}: probability {probability:.2f}"
            drawn.append(patch(self.pictures[sample], routing.grid, row, column, name))
        return drawn


def inspect_experts(
    model: nn.Module,
    images: Iterable[Image.Image] = (),
    captions: Sequence[str] = (),
    *,
    preprocess: Any = None,
    tokenizer: Any = None,
    dense: nn.Module | None = None,
    name: str = "model",
    batch_size: int = 32,
) -> ExpertReport:
    """Runs a sparse model over images and captions and records what its experts did. The model is left unchanged.

    Args:
        images: PIL images, read one batch at a time. preprocess: the model's transform, image to [3, height, width].
        captions: texts. tokenizer: the model's, from ``clipup.get_tokenizer``.
        dense: the model that was upcycled (or another of its architecture), to compare the experts with.
        name: the model's name on the page.
        batch_size: images, or captions, in a batch.

    Returns:
        The report, whose methods draw the figures and the page.

    Raises:
        ValueError: the model has no sparse layers, or is in int8; neither images nor captions; ``dense`` is sparse or
            has another architecture.
    """
    if quantization(model) is not None:
        raise ValueError("model is in int8, whose experts are not compared; pass the plain model that it was made from")
    similarities = model_similarity(model, dense)
    captions, split = list(captions), []
    kept: list[Image.Image] = []
    layers = route_images(model, _prepared(images, preprocess, kept), batch_size)
    if not kept and not captions:
        raise ValueError("there is nothing to inspect: images and captions are both empty")
    if captions:
        tokens = CheckedTokenizer(tokenizer, model)(captions)
        split = [pieces(tokenizer, row) for row in tokens.tolist()]
        of_texts = route_texts(model, tokens, batch_size)
        if any(layer.mask.shape[1] > tokens.shape[1] for layer in of_texts.values()):  # CoCa's own token comes last
            split = [[*of_text, Piece("\u27e8class\u27e9", len(of_text))] for of_text in split]
        layers |= of_texts
    return ExpertReport(name, kept, captions, split, layers, similarities)


def _prepared(
    images: Iterable[Image.Image], preprocess: Callable[[Image.Image], Tensor], kept: list[Image.Image]
) -> Iterator[Tensor]:
    """Tensors for the model, one per image; the image as the model sees it is added to ``kept``."""
    for image in images:
        tensor = preprocess(image)
        kept.append(_as_seen(tensor, preprocess))
        yield tensor


def _as_seen(tensor: Tensor, preprocess: Any) -> Image.Image:
    """A preprocessed image [3, height, width] as a PIL image, with the transform's normalization undone."""
    last = getattr(preprocess, "transforms", [None])[-1]
    if hasattr(last, "mean") and hasattr(last, "std"):
        mean, std = (tensor.new_tensor(values).view(-1, 1, 1) for values in (last.mean, last.std))
        tensor = tensor * std + mean
    pixels = (255 * tensor.float().clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _cosines(group: str, label: str, values: Sequence[float]) -> Column:
    return Column(group, label, tuple(_decimals(value, 3) for value in values))


def _relative(entropy: float, routing: LayerRouting) -> float:
    """An entropy as a share of its maximum, ln E, which is 0 for a single expert."""
    maximum = math.log(routing.num_experts)
    return entropy / maximum if maximum else math.nan


def _share(entropy: float, routing: LayerRouting) -> str:
    return _decimals(_relative(entropy, routing), 2)


def _range(values: Sequence[float], decimals: int) -> str:
    return " to ".join(dict.fromkeys(f"{value:.{decimals}f}" for value in (min(values), max(values))))


def _decimals(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else MISSING


def statements(report: ExpertReport) -> list[str]:
    """The summary, in sentences: what was run, how sure the routers are, how similar the experts are, and whether all
    are used."""
    sentences = [
        f"{_plural(len(report.similarities), 'sparse layer')}, run on {_plural(len(report.pictures), 'image')} and "
        f"{_plural(len(report.captions), 'caption')}."
        + (f" The model was trained for {_plural(report.steps, 'step')}." if report.steps else "")
        + _entropy(report),
        " ".join(filter(None, (_similarity(report, tower) for tower in _TOWERS))),
    ]
    if report.layers:
        busiest = max(report.layers, key=lambda name: imbalance(report.layers[name].load))
        unused = sum(int((layer.load == 0).sum()) for layer in report.layers.values())
        words = f"{_plural(unused, 'expert')} received no tokens" if unused else "Every expert received tokens"
        largest = imbalance(report.layers[busiest].load)
        sentences.append(
            f"{words}; the busiest received {largest:.2f} times the uniform share ({report.title(busiest)})."
        )
    is_padding = np.array([[piece.word == PADDING for piece in caption] for caption in report.pieces])
    padded = [(int((layer.mask & is_padding).sum()), layer.tokens) for layer in report.of_tower("text").values()]
    if padded and max(padded)[0]:
        routed, tokens = max(padded)
        sentences.append(f"The text tower routes padding too: {count(routed)} of its {_plural(tokens, 'token')}.")
    return [sentence for sentence in sentences if sentence]


def _entropy(report: ExpertReport) -> str:
    shares = [_relative(layer.token_entropy, layer) for layer in report.layers.values()]
    finite = [share for share in shares if math.isfinite(share)]
    if not finite:
        return ""
    return (
        f" Entropy of the router per token: {_range(finite, 2)} of its maximum, ln E, at which all experts are equally "
        "probable. Maps and cards show the first choice, by however little it is ahead."
    )


def _similarity(report: ExpertReport, tower: str) -> str:
    prefix = f"{tower.capitalize()} tower"
    named = ((report.title(name), layer.first_mean) for name, layer in report.similarities.items())
    means = [mean for title, mean in named if title.startswith(prefix) and math.isfinite(mean)]
    if not means:
        return ""
    most, least = in_words(max(means)), in_words(min(means))
    judged = f"are {most}" if most == least else f"range from {most} to {least}"
    mean = f"mean cosine between two experts' first matrices {_range(means, 3)}"
    return f"The experts of the {tower} tower {judged}: {mean}."


def _plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"
