"""Traces how the sparse layers of a model route images and texts.

Axis legend: ``N`` images or texts, ``S`` tokens each, ``E`` experts, ``K`` choices per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..clip import inputs
from ..evaluate.encode import device_of, in_batches
from ..moe.evaluation import evaluating
from ..moe.layer import SparseMoE, moe_layers
from ..moe.router import log_scores


@dataclass(frozen=True)
class LayerRouting:
    """How one sparse layer routed N images or texts in evaluation mode, before any choice was dropped."""

    tower: str
    """"image" or "text"."""
    expert_indices: np.ndarray
    """[N, S, K] integers, the first choice first; -1 for padding, and where no expert chose the token."""
    probabilities: np.ndarray
    """[N, S, E] float32 router probabilities, which sum to 1; 0 for padding that was not computed."""
    mask: np.ndarray
    """[N, S] bool: the tokens that were routed; False for padding."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches, which are the last tokens of every image; None for texts, and for images whose
    tokens are in no known grid."""

    @property
    def num_experts(self) -> int:
        return self.probabilities.shape[-1]

    @property
    def tokens(self) -> int:
        """Number of tokens that are not masked."""
        return int(self.mask.sum())

    @property
    def load(self) -> np.ndarray:
        """[E] each expert's share of all choices; sums to 1, or is all 0 if every token is masked."""
        return _shares(self.expert_indices, self.num_experts)

    @property
    def first_load(self) -> np.ndarray:
        """[E] each expert's share of first choices."""
        return _shares(self.expert_indices[..., 0], self.num_experts)

    @property
    def token_entropy(self) -> float:
        """Mean entropy of the router distribution per token, in nats: 0 is confident, ln E undecided."""
        unmasked = self._distributions()
        return float(_entropy(unmasked).mean()) if len(unmasked) else float("nan")

    @property
    def mean_entropy(self) -> float:
        """Entropy of the mean router distribution, in nats: ln E if the experts are used equally."""
        unmasked = self._distributions()
        return float(_entropy(unmasked.mean(0))) if len(unmasked) else float("nan")

    def maps(self) -> np.ndarray:
        """[N, rows, columns] first-choice expert of every patch of a layer with a grid."""
        assert self.grid is not None
        return self.expert_indices[:, self._first_patch() :, 0].reshape(-1, *self.grid)

    def strongest(self, expert: int, count: int) -> list[tuple[int, int]]:
        """(sample, token) of the ``count`` tokens that have this expert as their first choice with the largest
        probabilities, in descending order, at most one per sample; of an image, patches only."""
        start = self._first_patch()
        mine = self.expert_indices[:, start:, 0] == expert
        chosen = np.where(mine, self.probabilities[:, start:, expert], -1.0)
        best = chosen.max(1, initial=-1.0)
        order = np.argsort(-best, kind="stable")[:count]
        return [(int(sample), start + int(chosen[sample].argmax())) for sample in order if best[sample] >= 0]

    def patch_of(self, token: int) -> tuple[int, int]:
        """Row and column of a patch, by its token index."""
        assert self.grid is not None
        return divmod(token - self._first_patch(), self.grid[1])

    def _first_patch(self) -> int:
        return 0 if self.grid is None else self.expert_indices.shape[1] - self.grid[0] * self.grid[1]

    def _distributions(self) -> np.ndarray:
        return self.probabilities[self.mask].astype(np.float64)


def route_images(model: nn.Module, images: Iterable[Tensor], batch_size: int = 32) -> dict[str, LayerRouting]:
    """How each sparse layer of the image tower routes preprocessed images [3, height, width], by layer name.

    The model is left unchanged: its mode, its hooks and its ``moe_metrics``. Empty for a dense image tower.

    Raises:
        ValueError: the model has no sparse layers at all, or gives NaN or infinity.
    """
    device, dtype = device_of(model), inputs.image_dtype(model)
    encode = inputs.encoders(model)["image"]
    batches = (torch.stack(batch).to(device, dtype) for batch in in_batches(images, batch_size))
    return _route(model, encode, batches, "image")


def route_texts(model: nn.Module, texts: Tensor, batch_size: int = 32) -> dict[str, LayerRouting]:
    """How each sparse layer of the text tower routes texts [N, S] of token ids; otherwise like ``route_images``.

    Raises:
        ValueError: the model has no sparse layers at all, no text tower, or gives NaN or infinity.
    """
    encoders = inputs.encoders(model)
    if "text" not in encoders:
        raise ValueError(f"a {type(model).__name__} has no text tower; leave the captions out")
    batches = texts.to(device_of(model)).split(batch_size)
    return _route(model, encoders["text"], batches, "text", length=texts.shape[1])


def _route(
    model: nn.Module, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], tower: str, length: int = 0
) -> dict[str, LayerRouting]:
    layers, passes = moe_layers(model), defaultdict[str, list[tuple]](list)
    if not layers:
        raise ValueError("the model has no sparse layers, so it has no experts to inspect; upcycle it first")

    def keep(layer: SparseMoE, args: tuple, output: Tensor, name: str) -> None:
        """Records a pass: leading shape [N, ...] of the tokens, experts [N, S, K], probabilities [N, S, E], mask."""
        last, shape = layer.state.last_routing, tuple(output.shape[:-1])
        mask = last.logits.new_ones(len(last.logits), dtype=torch.bool) if last.mask is None else last.mask
        values = last.expert_indices, log_scores(last.logits, layer.config.score_function).softmax(-1), mask[:, None]
        arrays = (value.view(shape[0], -1, value.shape[-1]).cpu().numpy() for value in values)
        passes[name].append((shape, *arrays))

    with ExitStack() as stack, evaluating(model):
        for name, layer in layers.items():
            stack.callback(setattr, layer.state.mine, "last_routing", layer.state.last_routing)
            stack.enter_context(layer.register_forward_hook(partial(keep, name=name)))
        for batch in batches:
            if not encode(batch).isfinite().all():
                raise ValueError(f"the features of {tower}s: NaN or infinity, so the model is broken")
    routings = {}
    for name in (name for name in layers if name in passes):
        shape, experts, probabilities, mask = zip(*passes[name], strict=True)
        grid = _grid(model, shape[0]) if tower == "image" else None
        joined = _joined(experts, -1, length), _joined(probabilities, 0, length), _joined(mask, False, length)[..., 0]
        routings[name] = LayerRouting(tower, *joined, grid)
    return routings


def _joined(batches: Sequence[np.ndarray], absent: int, length: int) -> np.ndarray:
    """[N, S, ...] from batches [n, s, ...]; tokens left out of short texts, up to ``length``, are ``absent``."""
    missing = [((0, 0), (0, max(0, length - batch.shape[1])), (0, 0)) for batch in batches]
    padded = [np.pad(batch, widths, constant_values=absent) for batch, widths in zip(batches, missing, strict=True)]
    return np.concatenate(padded)


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
    prefix = 1 if hasattr(trunk, "class_embedding") else getattr(trunk, "num_prefix_tokens", 0)
    while rows and columns:  # later stages of hierarchical towers halve the grid and have no prefix tokens
        if shape[1] in (rows * columns, prefix + rows * columns):
            return rows, columns
        rows, columns = rows // 2, columns // 2
    return None


def _shares(experts: np.ndarray, num_experts: int) -> np.ndarray:
    counts = np.bincount(experts[experts >= 0], minlength=num_experts)
    return counts / max(1, int(counts.sum()))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of distributions along the last axis, in nats."""
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logs).sum(-1)
