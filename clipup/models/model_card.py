"""Model cards: the README.md in a model directory, in the Hugging Face hub's format."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from clipup_kernels import __version__

from ..atomic_files import replace_files
from ..clip import flops
from ..moe.layer import moe_layers, saved_config

README = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
_HEAD = "## Evaluation"
_NO_RESULTS = "Not evaluated yet: `clipup eval DIR --dataset ... --root ... --card` adds its results here."
_TABLE = ["| data | metric | % |", "|---|---|---|"]
_RECALL = re.compile(r"(text_to_image|image_to_text)_R@\d+")


def model_card(
    model: nn.Module, library: str, license: str = "other", base_model: str | None = None, extra: str | None = None
) -> str:
    """A card in Markdown with the hub's metadata: the model's structure and cost, and how to load it.

    Args:
        model: an open_clip or timm model, dense or sparse. It is not run; its FLOPs are counted on a meta copy.
        library: "open_clip" or "timm".
        license: the hub's name of a license, such as mit or apache-2.0.
        base_model: hub name ORG/NAME of the model that this model was made from, if known.
        extra: the extra of clipup that the model needs.
    """
    is_clip, layers = library == "open_clip", moe_layers(model)
    try:
        counts = flops.count(model)
    except Exception:  # from a user's module on the meta device: the model is saved all the same
        counts = None
    data = ModelCardData(
        license=license,
        library_name="clipup",
        base_model=base_model,
        pipeline_tag="zero-shot-image-classification" if is_clip else "image-feature-extraction",
        tags=["clip"] * is_clip + ["mixture-of-experts", "clip-up"] * bool(layers) or None,
    )
    card = ModelCard.from_template(
        data,
        str(_TEMPLATE),
        library=library,
        kind="CLIP" if is_clip else "image model",
        layers=layers,
        moe_config=saved_config(model),
        model=model,
        params=lambda module: sum(parameter.numel() for parameter in module.parameters()),
        active_params=flops.count_active(model),
        counts=counts,
        millions=lambda number: f"{number / 1e6:.1f} M",
        package="clipup" if extra is None else f"clipup[{extra}]",
        version=__version__,
        repository=_repository(),
        evaluation=_HEAD,
        no_results=_NO_RESULTS,
    )
    return f"{card}\n"


def _repository() -> str | None:
    """The address that the installed package names, as no index has it; None if it is not installed."""
    listed = (distribution.metadata.get_all("Project-URL") or () for distribution in distributions(name="clipup"))
    urls = (url.partition(", ")[2] for url in chain.from_iterable(listed) if url.startswith("Repository"))
    return next(urls, None)


def add_results(directory: str | Path, results: dict[str, Any]) -> None:
    """Adds results of ``clipup eval`` to the directory's card (``with_results``).

    Raises:
        FileNotFoundError: the directory has no README.md.
    """
    path = Path(directory) / README
    if not path.is_file():
        raise FileNotFoundError(f"card: no {README} in {directory}; clipup.save_pretrained writes one")
    text = with_results(path.read_text(encoding="utf-8"), results)
    replace_files({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def with_results(card: str, results: dict[str, Any]) -> str:
    """A card with results of ``clipup eval``: in the first table with the columns data, metric and %, or in a new table
    at the end. They replace those with the same data and metric; all else in the card stays.

    Args:
        results: ``retrieval`` and ``zero_shot`` as returned by the functions of these names; the data as ``dataset``
            with ``split`` and ``root`` if they matter, or as paths ``val_data`` and ``images``; optionally
            ``precision`` and ``multi_positive``.
    """
    lines = card.rstrip("\n").split("\n")
    if _NO_RESULTS in lines:
        place = lines.index(_NO_RESULTS)
        lines[place : place + 1] = _TABLE
    if _TABLE[0] not in lines:
        lines += ["", _HEAD, "", *_TABLE]
    start = lines.index(_TABLE[0]) + 2
    table = list(takewhile(lambda line: line.startswith("|"), lines[start:]))
    rows = {line.rpartition("|")[0].rpartition("|")[0]: line for line in table}
    rows |= {
        f"| {data} | {metric} ": f"| {data} | {metric} | {value} |" for (data, metric), value in _rows(results).items()
    }
    return "\n".join([*lines[:start], *rows.values(), *lines[start + len(table) :]]) + "\n"


def base_model_in(directory: str | Path) -> str | None:
    """The ``base_model`` in the directory's card; None if there is none, or no card that can be read."""
    path = Path(directory) / README
    try:
        return ModelCard.load(path).data.base_model if path.is_file() else None
    except (ValueError, yaml.YAMLError):  # written by hand
        return None


def _data(results: dict[str, Any], argument: str) -> str:
    """Name of the evaluation data: benchmark, the last part of its path and split, or the last two parts of the path in
    ``argument``."""
    if "dataset" in results:
        place = Path(results.get("root", "")).name.replace("|", "-")
        name = " ".join(part for part in (results["dataset"], place, results.get("split")) if part)
    else:
        name = "/".join(Path(results[argument]).parts[-2:]).replace("|", "-") if argument in results else "own data"
    precision = results.get("precision", "fp32")
    return name if precision == "fp32" else f"{name} in {precision}"


def _rows(results: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Percentages by (data, metric)."""
    rows: dict[tuple[str, str], str] = {}
    if "retrieval" in results:
        result = results["retrieval"]
        captions = "distinct captions" if results.get("multi_positive") else "captions"
        data = f"{_data(results, 'val_data')}: {result['gallery']:,} images, {result['captions']:,} {captions}"
        rows |= {(data, key): f"{100 * value:.2f}" for key, value in result.items() if _RECALL.fullmatch(key)}
    if "zero_shot" in results:
        result = results["zero_shot"]
        data = f"{_data(results, 'images')}: {result['images']:,} images, {result['classes']:,} classes"
        rows |= {(data, f"zero-shot top-{k}"): f"{100 * result[f'top{k}']:.2f}" for k in (1, 5)}
    return rows
