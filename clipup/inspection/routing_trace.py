"""How the sparse layers of a model route images and texts: which experts every patch and every token was sent to.

Axis legend: ``N`` images or texts, ``S`` tokens each, ``E`` experts, ``K`` choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..clip import inputs
from ..evaluate.encode import device_of, evaluating, in_batches
from ..moe.layer import SparseMoE, moe_layers
from ..moe.router import log_scores

NO_SPARSE_LAYERS = "the model has no sparse layers, so there are no experts to look at; clipup upcycle makes it sparse"


@dataclass(frozen=True)
class LayerRouting:
    """What one sparse layer did with N images or texts, in evaluation and before any choice was dropped."""

    tower: str
    """"image" or "text"."""
    expert_indices: np.ndarray
    """[N, S, K] integers, the first choice first; -1 for tokens that took no part (padding)."""
    probabilities: np.ndarray
    """[N, S, E] float32: the router's, which sum to 1; 0 for padding that was not computed."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches, which are the last tokens of every image; None for texts, and for images whose
    tokens lie in no grid that is known."""

    @property
    def num_experts(self) -> int:
        return self.probabilities.shape[-1]

    @property
    def tokens(self) -> int:
        """Tokens that took part."""
        return int((self.expert_indices[..., 0] >= 0).sum())

    @property
    def load(self) -> np.ndarray:
        """[E] share of all choices that fell on each expert; sums to 1, or is 0 where nothing took part."""
        return _shares(self.expert_indices, self.num_experts)

    @property
    def first_load(self) -> np.ndarray:
        """[E] the same of first choices alone."""
        return _shares(self.expert_indices[..., 0], self.num_experts)

    @property
    def token_entropy(self) -> float:
        """Mean entropy of a token's router distribution in nats: 0 is sure, ln E undecided."""
        taking_part = self._distributions()
        return float(_entropy(taking_part).mean()) if len(taking_part) else float("nan")

    @property
    def mean_entropy(self) -> float:
        """Entropy of the mean router distribution in nats: ln E where the experts are used alike."""
        taking_part = self._distributions()
        return float(_entropy(taking_part.mean(0))) if len(taking_part) else float("nan")

    def maps(self) -> np.ndarray:
        """[N, rows, columns] expert of every patch's first choice.

        Raises:
            ValueError: the layer has no grid.
        """
        if self.grid is None:
            raise ValueError("this layer's tokens lie in no grid of patches, so there is no map of them")
        return self.expert_indices[:, self._first_patch() :, 0].reshape(-1, *self.grid)

    def strongest(self, expert: int, count: int) -> list[tuple[int, int]]:
        """(sample, token) of the ``count`` tokens that the expert was chosen for first with the largest probabilities,
        the largest first, one a sample. Of an image's tokens only its patches."""
        start = self._first_patch()
        mine = self.expert_indices[:, start:, 0] == expert
        chosen = np.where(mine, self.probabilities[:, start:, expert], -1.0)
        best = chosen.max(1, initial=-1.0)
        order = np.argsort(-best, kind="stable")[:count]
        return [(int(sample), start + int(chosen[sample].argmax())) for sample in order if best[sample] >= 0]

    def patch_of(self, token: int) -> tuple[int, int]:
        """Row and column of a token that is a patch."""
        return divmod(token - self._first_patch(), self.grid[1])

    def _first_patch(self) -> int:
        return 0 if self.grid is None else self.expert_indices.shape[1] - self.grid[0] * self.grid[1]

    def _distributions(self) -> np.ndarray:
        return self.probabilities[self.expert_indices[..., 0] >= 0].astype(np.float64)


def route_images(model: nn.Module, images: Iterable[Tensor], batch_size: int = 32) -> dict[str, LayerRouting]:
    """How each sparse layer of the image tower routes preprocessed images [3, height, width], by the layers' names.

    The model is as it was afterwards: its mode, its hooks, and what ``moe_metrics`` says about it. An image tower that
    is dense gives no layers.

    Raises:
        ValueError: the model has no sparse layers at all.
    """
    device, dtype = device_of(model), inputs.image_dtype(model)
    encode = inputs.encoders(model)["image"]
    batches = (torch.stack(batch).to(device, dtype) for batch in in_batches(images, batch_size))
    return _route(model, encode, batches, "image")


def route_texts(model: nn.Module, texts: Tensor, batch_size: int = 32) -> dict[str, LayerRouting]:
    """How each sparse layer of the text tower routes texts [N, S] of token ids; otherwise as ``route_images``.

    Raises:
        ValueError: the model has no sparse layers at all, or no text tower.
    """
    encoders = inputs.encoders(model)
    if "text" not in encoders:
        raise ValueError(f"a {type(model).__name__} has no text tower; leave the captions out")
    batches = texts.to(device_of(model)).split(batch_size)
    return _route(model, encoders["text"], batches, "text", length=texts.shape[1])


def _route(
    model: nn.Module, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], tower: str, length: int = 0
) -> dict[str, LayerRouting]:
    layers = moe_layers(model)
    if not layers:
        raise ValueError(NO_SPARSE_LAYERS)
    with _recording(layers) as found, evaluating(model):
        for batch in batches:
            encode(batch)
    routings = {}
    for name in (name for name in layers if name in found):
        shape, experts, probabilities = zip(*found[name], strict=True)
        grid = _grid(model, shape[0]) if tower == "image" else None
        routings[name] = LayerRouting(
            tower, _joined(experts, -1, length), _joined(probabilities, 0, length), grid
        )  # fmt: skip
    return routings


def _joined(batches: Sequence[np.ndarray], absent: int, length: int) -> np.ndarray:
    """[N, S, ...] out of batches [n, s, ...]: tokens that short texts were computed without, up to ``length`` of them,
    are ``absent``."""
    missing = [((0, 0), (0, max(0, length - batch.shape[1])), (0, 0)) for batch in batches]
    return np.concatenate([np.pad(*one, constant_values=absent) for one in zip(batches, missing, strict=True)])


@contextmanager
def _recording(layers: dict[str, SparseMoE]) -> Iterator[dict[str, list[tuple]]]:
    """{layer: [(leading shape [N, ...] of tokens, expert indices [N, S, K], probabilities [N, S, E]) per forward]}."""
    found: dict[str, list[tuple]] = {}

    def hook_of(name: str) -> Callable:
        def keep(layer: SparseMoE, inputs: tuple, output: Tensor) -> None:
            last, shape = layer.records.last_routing, tuple(output.shape[:-1])
            expert_indices, probabilities = last.expert_indices, log_scores(last.logits, layer.config.score).softmax(-1)
            by_sample = [
                values.view(shape[0], -1, values.shape[-1]).cpu().numpy() for values in (expert_indices, probabilities)
            ]
            found.setdefault(name, []).append((shape, *by_sample))

        return keep

    before = {layer: layer.records.last_routing for layer in layers.values()}
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for layer, last in before.items():
            layer.records.last_routing = last


def _grid(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of patches in an image tower's tokens of leading shape [N, S] or [N, rows, columns]."""
    if len(shape) == 3:
        return shape[1], shape[2]
    tower = getattr(model, "visual", model)
    trunk = getattr(tower, "trunk", tower)
    grid = getattr(trunk, "grid_size", None) or getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if grid is None or len(shape) != 2:
        return None
    rows, columns = grid
    in_front = 1 if hasattr(trunk, "class_embedding") else getattr(trunk, "num_prefix_tokens", 0)
    if shape[1] == in_front + rows * columns:
        return rows, columns
    while min(rows, columns) > 1:  # later stages of hierarchical towers have halved grids, without tokens in front
        rows, columns = rows // 2, columns // 2
        if shape[1] == rows * columns:
            return rows, columns
    return None


def _shares(experts: np.ndarray, num_experts: int) -> np.ndarray:
    counts = np.bincount(experts[experts >= 0], minlength=num_experts)
    return counts / max(1, counts.sum())


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of distributions along the last axis, in nats."""
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logs).sum(-1)
