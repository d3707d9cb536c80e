"""How the inputs of int8 products are centred and scaled, and what the products lose: from weights alone, or from rows
that layers see in a few batches.

Axis legend: ``N`` rows, ``E`` experts (1 in a dense layer), ``I`` inputs and ``O`` outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipup_kernels import grouped_linear, pack_weight, unpack_weight
from clipup_kernels.reference import activate

MATRICES = ("in_weight", "out_weight", "gate_weight")
"""Names, in ``SparseMoE`` and ``DenseMLP``, of the parameters that are packed."""
BIASES = ("in_bias", "out_bias", "gate_bias")
"""Names of the biases of these matrices."""
MOST_ROWS, LEAST_ROWS = 1024, 256
"""Rows of a matrix's inputs that are kept; with fewer than the second, what follows from weights alone is used."""
_ALPHAS, _FAR, _USUAL = (0.3, 0.5, 0.7, 0.9), (0.5, 1.5, math.inf), 2.0
"""How much ranges count beside sizes of weights; the least distance from 0, in standard deviations, of a mean that is
taken out; and up to how many medians of the ranges one is usual. Chosen on a sentence encoder
(docs/performance_log.md)."""
_SHARED_INPUT = (("in_weight", "gate_weight"), ("out_weight",))
"""Matrices with the same inputs."""


class Inputs(NamedTuple):
    """What is quantized of a matrix's inputs: ``(x - offset) * scale``; and of the matrix, ``w / scale``."""

    scale: Tensor
    """[I] or [E, I] float32."""
    offset: Tensor
    """The same; zeros where nothing is known about the inputs."""


class Calibration(NamedTuple):
    """Scales and offsets chosen from a layer's rows, and the error that they leave."""

    inputs: Mapping[str, Inputs]
    """By the names of the matrices."""
    error: float
    """Root mean square of the error of the layer's worst matrix, relative to how its outputs vary between rows; 0 where
    none varies."""


def balanced(tensors: Mapping[str, Tensor]) -> dict[str, Inputs]:
    """The inputs of matrices [.., O, I] by their names, as nothing but the weights is known.

    Where a norm makes some channels large, the weights that read them are small. The scale of an input is the square
    root of their size relative to the other inputs': half of what would make all columns equally large (SmoothQuant,
    arXiv 2211.10438, eq. 4 with alpha = 0.5, equal max|X_j|, and this size for max|W_j|: no calibration data). The size
    is the root mean square over outputs, each weight relative to the largest of its output: that is what its rounding
    depends on, and so one outlier, which its output pays for anyway, costs the other outputs nothing.
    """
    inputs: dict[str, Inputs] = {}
    for group in _groups(tensors):
        weights = [tensors[name] for name in group]
        if 0 not in weights[0].shape:
            inputs |= dict.fromkeys(group, _balanced(weights))
    return inputs


def calibrated(
    tensors: Mapping[str, Tensor],
    rows: list[dict[str, Tensor]],
    hidden: Callable[[int, Tensor], Tensor],
    centred: Collection[str],
) -> Calibration:
    """The inputs of matrices, as rows of a layer say: every other row chooses, the others measure.

    Args:
        tensors: of the layer, [.., O, I] and [.., O], by their names.
        rows: of each expert, its inputs [N, I] by the matrix ("in_weight" for those that share them); those of
            "out_weight" are computed where they are missing.
        hidden: (expert, its inputs [N, I]) -> the inputs of its "out_weight".
        centred: matrices whose rows are quantized around their middles.
    """
    inputs: dict[str, list[Inputs]] = {}
    errors: dict[str, list[Tensor]] = {}
    for expert, seen in enumerate(rows):
        matrices = {
            name: tensors[name].float().reshape(-1, *tensors[name].shape[-2:])[expert]
            for name in MATRICES
            if name in tensors
        }
        for group in _groups(matrices):
            x = seen[group[0]] if group[0] in seen else hidden(expert, seen["in_weight"])
            weights = [matrices[name] for name in group]
            chosen = _inputs(weights, x[::2], group[0] in centred) if len(x) >= LEAST_ROWS else _balanced(weights)
            for name in group:
                inputs.setdefault(name, []).append(chosen)
            errors.setdefault(group[0], []).append(_lost(weights, x[1::2], chosen, group[0] in centred))
    totals = [torch.stack(parts).sum(0) for parts in errors.values()]
    return Calibration(
        {
            name: Inputs(*(torch.stack(each).view(*tensors[name].shape[:-2], -1) for each in zip(*parts, strict=True)))
            for name, parts in inputs.items()
        },
        max(
            (math.sqrt(lost / varies) for lost, varies, _ in (total.tolist() for total in totals) if varies),
            default=0.0,
        ),
    )


def hidden_rows(tensors: Mapping[str, Tensor], x: Tensor, activation: str, ln_eps: float = 1e-5) -> Tensor:
    """The inputs [N, H] of an MLP's output projection: x [N, D], and its tensors without the axis of experts."""
    hidden = _linear(x, tensors, "in")
    hidden = (
        activate(_linear(x, tensors, "gate"), activation) * hidden
        if "gate_weight" in tensors
        else activate(hidden, activation)
    )
    if "ln_weight" not in tensors:
        return hidden
    return F.layer_norm(hidden, hidden.shape[-1:], tensors["ln_weight"].float(), tensors["ln_bias"].float(), ln_eps)


def _linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    bias = tensors.get(f"{name}_bias")
    return F.linear(x, tensors[f"{name}_weight"].float(), None if bias is None else bias.float())


def _groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    groups = [[name for name in group if name in tensors] for group in _SHARED_INPUT]
    return [group for group in groups if group]


def _balanced(weights: list[Tensor]) -> Inputs:
    """From weights [.., O, I] of one input alone."""
    scale = _relative(_column_sizes(weights)).sqrt()
    return Inputs(scale, torch.zeros_like(scale))


def _inputs(weights: list[Tensor], x: Tensor, centred: bool) -> Inputs:
    """From weights [O, I] of one input, and rows of it, [N, I]: of some choices, the choice that loses least, in all
    rows together and, relative to its own size, in every row. Among rows of two kinds, what is best for the sum alone
    can be bad for one kind.

    What most rows have in common is taken out: the means of inputs that are far from 0 for how much they vary. Scales
    follow equation 4 of SmoothQuant with several alphas, but inputs that are smaller than usual are not enlarged
    more than others: those that are rarely active have a small range in a sample, and would fill the whole range of a
    row with a single large value.
    """
    sizes, mean, choices = _relative(_column_sizes(weights)), x.mean(0), []
    for far in _FAR:
        offset = torch.where(mean.abs() > far * x.std(0), mean, torch.zeros_like(mean))
        ranges = (x - offset).abs().amax(0)
        usual = ranges.median() if ranges.median() > 0 else ranges.mean()  # of an activation that is mostly 0
        ranges = _relative(ranges.clamp(min=_USUAL * usual))
        choices += [Inputs(sizes ** (1 - alpha) / ranges**alpha, offset) for alpha in _ALPHAS]

    def loss(choice: Inputs) -> float:
        squares, _, relative = _lost(weights, x, choice, centred).tolist()
        return squares * relative

    return min(choices, key=loss)


def _lost(weights: list[Tensor], x: Tensor, inputs: Inputs, centred: bool) -> Tensor:
    """[3]: the squared errors of products of x in int8, how far the products are from their means, and the errors
    relative to the product of the same row; sums. ``centred``: rows are quantized around their middles."""
    offsets = torch.tensor([0, len(x)], dtype=torch.int32)
    quantized = (x - inputs.offset) * inputs.scale
    middles = (quantized.amax(-1, keepdim=True) + quantized.amin(-1, keepdim=True)) / 2 * centred
    common = middles / inputs.scale
    total = torch.zeros(3, dtype=torch.float64)
    for weight in weights:
        y = F.linear(x - inputs.offset, weight)
        packed = pack_weight(weight[None], "int8", *inputs)
        errors = grouped_linear(x - common, packed, None, offsets) + F.linear(common, unpack_weight(packed)[0]) - y
        errors, sizes = (part.double().square().sum(-1) for part in (errors, F.linear(x, weight)))
        varies = (y - y.mean(0)).double().square()
        total += torch.stack([errors.sum(), varies.sum(), (errors / sizes.clamp(min=1e-30)).sum()])
    return total


def _column_sizes(weights: list[Tensor]) -> Tensor:
    """[.., I]: see ``balanced``."""
    mean_squares = [
        (weight.float() / weight.abs().amax(-1, keepdim=True)).nan_to_num_(0.0).square_().mean(-2)  # 0 / 0: 0
        for weight in (weight.contiguous() for weight in weights)  # sums of other strides round differently
    ]
    return torch.stack(mean_squares).mean(0).sqrt()


def _relative(sizes: Tensor) -> Tensor:
    """To the median, within a range that int8 can use."""
    return (sizes / sizes.median(-1, keepdim=True).values.clamp(min=1e-30)).clamp(1 / 1024, 1024)
