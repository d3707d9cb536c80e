"""``accelerate``: prepares a model for CPU inference by packing the weights of its MLPs, experts and attention."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from clipup_kernels import pack_weight
from clipup_kernels.types import QUANTIZATIONS, Quantization

from .. import checks
from ..clip.hugging_face import is_hugging_face
from ..clip.row_samples import RowSample, calls_observed, run_batch
from ..moe.evaluation import evaluating
from ..moe.experts import Experts
from ..precision import Precision
from ..progress import progress
from .calibration import LEAST_ROWS, MATRICES, MOST_ROWS, Calibration, calibrated
from .prepared import Prepared, PreparedMLP, quantization
from .prepared_experts import PreparedRoutedExperts, is_routed_experts
from .prepared_linear import PreparedPatches
from .replacement import replace_layers
from .report import CAN_BE_PREPARED, rows_of
from .selection import ONLY_IN_INT8, PREPARED_EXPERTS, Selection, has_adapters

M = TypeVar("M", bound=nn.Module)
Batch = Tensor | tuple[Tensor | None, ...] | list[Tensor | None] | Mapping[str, Any]
"""The arguments of a model: one, several, or by name."""


class NothingToPrepare(ValueError):
    """The model has no layer that can be prepared."""


@overload
def accelerate(  # type: ignore[overload-overlap]  # a single MLP is replaced
    model: nn.Sequential,
    inplace: bool = False,
    weights: Quantization | None = None,
    calibrate: Iterable[Batch] | None = None,
    exclude: Iterable[str] = (),
) -> nn.Sequential | PreparedMLP: ...
@overload
def accelerate(
    model: M,
    inplace: bool = False,
    weights: Quantization | None = None,
    calibrate: Iterable[Batch] | None = None,
    exclude: Iterable[str] = (),
) -> M: ...
@torch.inference_mode(False)  # parameters copied there could not be loaded into or trained elsewhere
@torch.no_grad()
def accelerate(
    model: nn.Module,
    inplace: bool = False,
    weights: Quantization | None = None,
    calibrate: Iterable[Batch] | None = None,
    exclude: Iterable[str] = (),
) -> nn.Module:
    """Prepares a model for CPU inference: layers store packed weights instead of plain ones.

    The outputs of sparse layers are bitwise unchanged, unless they are quantized. Dense MLPs and self-attention in the
    blocks of open_clip, torchvision, timm and transformers (``clipup.inference.prepared_attention`` names them), the
    convolutions that embed the patches of a ViT, the experts (not the routers, nor shared experts) of transformers' MoE
    models and, in a model with sparse layers, every ``nn.Sequential`` of a linear layer, an activation, perhaps
    dropout, and a linear layer run on clipup's kernels, with the same outputs up to rounding. In text towers that
    return only the features of the end-of-text token, computation stops at the end of the longest text in the batch, as
    in upcycled models (``clipup.clip.padding_aware``). All other modules are unchanged, and
    ``clipup.accelerate_report(model)`` says of each layer why: MLPs that have a norm between their projections,
    attention beside an MLP that is left (except in int8), attention in float16 (except in int8) and float64, layers
    with PEFT's adapters, what has hooks, buffers, parameters or a ``forward`` that are not its class's, and what lies
    in attention or a block with a ``forward`` of its own. A layer that several modules share is prepared once, for all
    of them; of BERT's MLPs, which are two modules, both must be shared.

    The result is in evaluation mode and has no parameter that requires a gradient. Training, casting or moving a
    prepared layer raises an error. So does ``load_state_dict``, before it loads anything. Threads can share prepared
    layers; deepcopy and pickle work, and ``state_dict()`` has the names and values of the plain model. Upcycle, cast
    and load before preparing.

    With ``weights="int8"``, the matrices of experts, dense MLPs, attention and patch embeddings are quantized by output
    channel, and their inputs by row at every call; so outputs of sparse layers change too. Attention without a mask
    multiplies in int8, too, but not in bfloat16 on AMX (``clipup_kernels.self_attention``). ``state_dict()`` then
    raises: the plain weights are gone. ``clipup.save_pretrained`` writes the integers, and
    ``create_model_and_transforms`` loads them; so do transformers' own methods.

    Packed weights take the memory of plain ones; those of bfloat16 twice as much on CPUs whose instructions have no
    bfloat16 products, and those of float16 everywhere, because they are widened to float32 once instead of in every
    call.

    Args:
        model: a model on the CPU with transformer blocks of a family in ``clipup.dense.mlp_families``, sparse or dense;
            or a single ``SparseMoE`` or MLP.
        inplace: modify ``model`` instead of a copy, all of it or, after an error below, nothing (but text towers that
            stop at the longest text do so already). A single layer is always replaced: use the return value.
        weights: None to keep the weights' type, or "int8".
        calibrate: with "int8", a list of a few batches of your own data, on which the plain model runs first: the
            argument of a model (images), several as a tuple (images and texts), or a dict of arguments by name
            (``input_ids``, ``attention_mask``). What most rows of a layer's input have in common then costs no
            precision, and large channels less (``clipup.inference.calibration``); still nothing is clipped, since rows
            are scaled at every call. Padding of texts is left out, but not for the experts of transformers' MoE models;
            patch embeddings are not calibrated. ``accelerate_report`` says how large the errors of each layer are on
            these batches. A layer or an expert that sees fewer than 256 rows (1,024 are used) is quantized as without
            batches; a warning says which.
        exclude: patterns of names in ``model.named_modules()``, as of ``fnmatch``, such as ``["visual.*", "*.attn"]``.
            A layer is left as it is if its name, that of a module around it or that of a linear layer in it matches.

    Raises:
        TypeError: ``model`` is not a module, or contains a SparseMoE of a derived class, as a parametrized one is.
        ValueError: the model has nothing to prepare (NothingToPrepare, with the reasons), or is not on the CPU;
            ``weights`` is unknown; ``calibrate`` is given without "int8", has no batch, or has a batch with which a
            layer's inputs are not finite; a pattern matches no name, or a layer that is prepared; a
            layer has more inputs than int8 products can sum (65,536).
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8 (no compiled extension, or float64).
    """
    checks.module("model", model)
    checks.boolean("inplace", inplace)
    if weights is not None:
        checks.one_of("weights", weights, QUANTIZATIONS)
    if calibrate is not None and weights is None:
        raise ValueError('calibrate was given without weights="int8": only quantized layers are calibrated')
    if isinstance(calibrate, Tensor | Mapping):
        raise TypeError(f"calibrate must be a list of batches, got one, a {type(calibrate).__name__}; pass [batch]")
    exclude = tuple(exclude)
    _check(model, weights)
    if not inplace:
        model = copy.deepcopy(model)
    selection = Selection(model, weights, exclude)
    _check_layers(selection)
    chosen = selection.chosen
    bases = {base.__module__.partition(".")[0] for part in model.modules() for base in type(part).__mro__}
    if not bases.isdisjoint(("open_clip", "timm", "transformers")):  # whose towers can skip padding
        from ..clip.padding_aware import make_padding_aware  # imports open_clip, which SparseMoE does not need

        make_padding_aware(model)  # first, so that calibration sees what the prepared model computes
    calibrations = {} if calibrate is None else _calibrations(model, chosen, calibrate)
    model = replace_layers(model, chosen, weights, calibrations)
    if weights is not None and any(map(is_hugging_face, model.modules())):
        from .hugging_face_quantizer import let_transformers_save  # imports transformers, which is optional

        let_transformers_save(model)
    return model


def _calibrations(
    model: nn.Module, chosen: dict[nn.Module, type[Prepared]], batches: Iterable[Batch]
) -> dict[nn.Module, Calibration]:
    """Of the layers that see enough rows when the model runs on the batches; a warning names the others."""
    names = {module: name or "model" for name, module in model.named_modules()}
    samples: dict[nn.Module, list[dict[str, RowSample]]] = {}
    mask: Tensor | None = None  # of the batch that runs, as is its place
    place = 0

    def keep(
        inputs_of: Callable[..., list[dict[str, Tensor]]],
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        seen = inputs_of(*args, **kwargs)
        kept = samples.setdefault(
            layer, [{name: RowSample(MOST_ROWS, seed) for name in inputs} for seed, inputs in enumerate(seen)]
        )
        for sample, inputs in zip(kept, seen, strict=True):
            for name, rows in inputs.items():
                rows = _without_padding(rows, mask)
                if not rows.isfinite().all():
                    raise ValueError(
                        f"calibrate[{place}] gives {names[layer]} inputs that are not finite; correct or remove it"
                    )
                sample[name].add(rows)

    watched = {  # they have no hooks; of patches, what most have in common is background, and the others matter
        layer: partial(keep, kind.seen(layer)) for layer, kind in chosen.items() if kind is not PreparedPatches
    }
    with evaluating(model), calls_observed(watched):
        for number, batch in enumerate(progress(batches, "calibrating", "batches")):
            mask, place = _text_mask(model, batch), number
            run_batch(model, batch)
    if not samples:
        raise ValueError("calibrate has no batches, or none that reach a layer; pass a list of batches")
    rows = {
        layer: [{name: sample.rows for name, sample in of_expert.items()} for of_expert in kept]
        for layer, kept in samples.items()
    }
    counts = {layer: [len(of_expert["in_weight"]) for of_expert in rows.get(layer, ())] or [0] for layer in watched}
    few = [f"{names[layer]} ({min(seen)} rows)" for layer, seen in counts.items() if min(seen) < LEAST_ROWS]
    if few:
        listed = ", ".join(few[:3]) + f" and {len(few) - 3} more" * (len(few) > 3)
        warnings.warn(
            f"calibrate: {len(few)} of {len(watched)} layers, or some of their experts, saw fewer than {LEAST_ROWS} "
            f"rows and are quantized without calibration: {listed}; pass more batches",
            stacklevel=5,  # the caller of accelerate, which has two decorators
        )
    return {
        layer: calibrated(
            chosen[layer].tensors(layer), seen, partial(chosen[layer].hidden, layer), chosen[layer].centred
        )
        for layer, seen in progress(rows.items(), "choosing int8 scales", "layers")
        if max(counts[layer]) >= LEAST_ROWS
    }


def _text_mask(model: nn.Module, batch: Batch) -> Tensor | None:
    """[B, L] bool: where a batch has text, not padding; None without texts, or where it is not known."""
    if isinstance(batch, Mapping) and (mask := batch.get("attention_mask")) is not None:
        return mask.bool() if mask.dim() == 2 else None
    parts = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    texts = [part for part in parts if isinstance(part, Tensor) and part.dim() == 2 and not part.is_floating_point()]
    if not texts:
        return None
    from ..clip.padding_aware import text_mask

    return text_mask(model, texts[0])


def _without_padding(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [.., I] as [N, I]. Where they are [B, L, I], as the tokens of texts with a mask [B, L], or what is left of
    them without what is padding in all texts, those of padding are left out."""
    if mask is not None and rows.dim() == 3 and len(rows) == len(mask):
        positions = torch.arange(1, mask.shape[1] + 1)
        if rows.shape[1] in (mask.shape[1], int((mask * positions).max())):
            rows = rows[mask[:, : rows.shape[1]]]
    return rows.reshape(-1, rows.shape[-1])


def _check_layers(selection: Selection) -> None:
    """Refuses a model before anything is changed: one with nothing to prepare, or with a layer that cannot be."""
    if not any(
        issubclass(kind, (*PREPARED_EXPERTS.values(), PreparedRoutedExperts, PreparedMLP))
        for kind in (*selection.chosen.values(), *map(type, selection.model.modules()))
    ):
        rows = {
            row.reason: f"\n  {row}" for row in rows_of(selection) if row.reason not in (CAN_BE_PREPARED, ONLY_IN_INT8)
        }
        raise NothingToPrepare(f"the model has no sparse layer and no dense MLP to prepare{''.join(rows.values())}")
    for name, module in selection.model.named_modules():
        tensors = selection.chosen[module].read(module) if module in selection.chosen else {}
        for matrix in (value for key, value in tensors.items() if key in MATRICES and value is not None):
            try:
                pack_weight(matrix[..., :1, :], selection.weights)  # one output is refused for the same reasons as all
            except (RuntimeError, TypeError, ValueError) as error:
                raise type(error)(f"{name or 'model'}: {error}") from error


def _check(model: nn.Module, weights: str | None) -> None:
    if devices := {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}:
        raise ValueError(f"the model is on {devices.pop()}, but it must be on the CPU; move it first: model.cpu()")
    for name, module in model.named_modules():
        if isinstance(module, Prepared):
            if module.quantize != weights:
                raise ValueError(
                    f"{name or 'model'} was prepared with weights={module.quantize!r} before, and cannot be changed to "
                    f"{weights!r}; prepare the plain model"
                )
        elif has_adapters(module) and any(
            isinstance(part, Experts) or is_routed_experts(part) for part in module.children()
        ):
            raise TypeError(f"{name or 'model'} has PEFT's adapters; merge them first: model.merge_and_unload()")
        elif isinstance(module, Experts) and type(module) not in PREPARED_EXPERTS:
            raise TypeError(
                f"{name or 'model'} is a {type(module).__qualname__}, which may compute something else than a "
                "SparseMoE; load its weights into a SparseMoE and prepare that"
            )


def for_inference(model: M, precision: Precision = "fp32", weights: Quantization | None = None) -> M:
    """Puts a model into evaluation mode and prepares it in place (``clipup.accelerate``) where that is faster: on the
    CPU without autocast, which would have to cast packed weights. With ``weights``, that is required. A model in int8
    stays as it is."""
    model.eval()
    if quantization(model) is not None:
        return model
    if weights is not None:
        return accelerate(model, inplace=True, weights=weights)
    if next(model.parameters()).device.type != "cpu" or precision in ("amp", "amp_bf16"):
        return model
    try:
        return accelerate(model, inplace=True)
    except NothingToPrepare:
        return model
