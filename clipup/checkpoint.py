"""Model directories: open_clip's hub format (a config and safetensors) with ``moe_cfg`` beside ``model_cfg``.

    DIR/open_clip_config.json         {"model_cfg": ..., "preprocess_cfg": ..., "moe_cfg": ...}
    DIR/open_clip_model.safetensors   the state dict
    DIR/README.md                     the model card
    DIR/vocabulary.txt                where the tokenizer is clipup's own (``clipup.word_tokenizer``)

``huggingface_hub.upload_folder`` can push such a directory as it is. timm models have timm's two files in place of
open_clip's (``clipup.timm_models``). Files are replaced only once the new ones lie whole on the disk.
``clipup.create_model_and_transforms(DIR)`` reads both; plain open_clip reads the config too, and refuses the weights of
a sparse model because they do not fit a dense one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import checks, word_tokenizer
from .config import MoEConfig
from .moe import moe_layers
from .prepared import Prepared
from .weights import read_safetensors, types_in_safetensors

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
_PREPROCESS_FIELDS = ("mean", "std", "interpolation", "resize_mode")
_MODEL_FIELDS = ("embed_dim", "vision_cfg", "text_cfg")
_SHOWN = 3
_WRITING = ".writing"
_LONGEST_WRITE = 24 * 3600
_own: set[str] = set()
"""Temporary directories of this process's own writers."""


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    model_cfg: dict[str, Any] | None = None,
    preprocess_cfg: dict[str, Any] | None = None,
    license: str = "other",
    base_model: str | None = None,
) -> None:
    """Writes a model, dense or upcycled, with a model card. ``clipup.create_model_and_transforms(directory)`` loads it,
    ``clipup.create_timm_model(directory)`` where it is a timm model.

    Args:
        model: what ``clipup.upcycle``, open_clip or timm returned, not wrapped.
        directory: made when it does not exist; a model in it is replaced with its card, and stays whole if writing
            fails.
        model_cfg: open_clip's architecture config, as ``clipup.get_model_config(name)`` returns it. For a timm model
            arguments of ``timm.create_model`` that timm did not record itself.
        preprocess_cfg: mean, std, interpolation, resize_mode; None takes what open_clip attached to the model.
        license: of the weights, in the card, by the hub's name for it (mit, apache-2.0, ...).
        base_model: ORG/NAME on the hub of the model that this one was made from, for the card.

    Raises:
        ValueError: ``model_cfg`` is no model config, the model has sparse layers but no ``moe_config``, or it was
            prepared for inference.
        OSError: a file could not be written.
    """
    checks.module("model", model)
    if any(isinstance(module, Prepared) for module in model.modules()):
        raise ValueError(
            "the model was prepared by clipup.accelerate; save the plain model, or load this one's state_dict() into it"
        )
    moe_config = getattr(model, "moe_config", None)
    if moe_config is None and moe_layers(model):
        raise ValueError(
            "the model has sparse layers but no moe_config, so it could not be built again; make it with clipup.upcycle"
        )
    # these import open_clip, which takes seconds and which SparseMoE does not need
    from . import card, timm_models, towers

    library = "timm" if towers.is_timm(model) else "open_clip"
    if library == "timm":
        names = timm_models.CONFIG_NAME, timm_models.WEIGHTS_NAME
        config = timm_models.config_of(model, model_cfg)
    else:
        names = CONFIG_NAME, WEIGHTS_NAME
        config = _open_clip_config(model, model_cfg, preprocess_cfg)
    if moe_config is not None:
        config["moe_cfg"] = moe_config.to_dict()
    text_cfg = config["model_cfg"]["text_cfg"] if library == "open_clip" else {}
    of_hugging_face = "hf_model_name" in text_cfg or "hf_tokenizer_name" in text_cfg
    extra = "hf" if of_hugging_face and not word_tokenizer.is_asked_for(text_cfg) else None
    texts = {card.README: card.model_card(model, library, license, base_model, extra)}
    vocabulary = word_tokenizer.vocabulary_text(text_cfg)
    if vocabulary is not None:
        texts[word_tokenizer.FILE_NAME] = vocabulary
    texts[names[0]] = json.dumps(config, indent=2) + "\n"  # last: it is what a directory is known by
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    writers: dict[Path, Callable[[Path], object]] = {
        directory / names[1]: lambda path: _save_tensors(tensors, path, directory)
    }
    for name, text in texts.items():
        writers[directory / name] = lambda path, text=text: path.write_text(text, encoding="utf-8")
    replace_files(writers)


def _open_clip_config(
    model: nn.Module, model_cfg: dict[str, Any] | None, preprocess_cfg: dict[str, Any] | None
) -> dict[str, Any]:
    missing = [field for field in _MODEL_FIELDS if field not in (model_cfg or {})]
    if missing:
        raise ValueError(f"model_cfg lacks {', '.join(missing)}; pass clipup.get_model_config(name)")
    if preprocess_cfg is None:
        preprocess_cfg = getattr(getattr(model, "visual", None), "preprocess_cfg", {})
    return {
        "model_cfg": model_cfg,
        "preprocess_cfg": {name: preprocess_cfg[name] for name in _PREPROCESS_FIELDS if name in preprocess_cfg},
    }


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes files so that they appear whole and together, or not at all.

    Every writer gets a path to write to, in a temporary directory beside its own. Once all have written and the bytes
    are on the disk, the files are moved into place. When anything fails before that, what was there stays as it was.
    What a killed process left behind in such directories is removed.
    """
    name = f"{_WRITING}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    folders = {path.parent: path.parent / name for path in writers}
    written = {path: folders[path.parent] / path.name for path in writers}
    _own.add(name)
    try:
        for parent, folder in folders.items():
            remove_abandoned(parent)
            folder.mkdir()
        for path, write in writers.items():
            write(written[path])
            written[path].chmod(folders[path.parent].stat().st_mode & 0o666)  # safetensors makes its files private
            with open(written[path], "rb+") as file:
                os.fsync(file.fileno())
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        _own.discard(name)


def remove_abandoned(directory: Path, locked: bool = False) -> None:
    """Removes temporary directories in which processes were killed while they wrote into ``directory``.

    Args:
        locked: the caller's lock says that nothing else writes there. Otherwise those of this machine go whose process
            has ended, and those of other machines after a day.
    """
    for folder in directory.glob(f"{_WRITING}.*.tmp"):
        maker = re.fullmatch(rf"{re.escape(_WRITING)}\.(.+)\.(\d+)\.[0-9a-f]{{8}}\.tmp", folder.name)
        if maker is not None and folder.name not in _own and (locked or _abandoned(folder, maker[1], int(maker[2]))):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path, host: str, pid: int) -> bool:
    try:
        if host != socket.gethostname():
            return time.time() - folder.stat().st_mtime > _LONGEST_WRITE
        if pid != os.getpid():
            os.kill(pid, 0)  # sends nothing
            return False
    except (FileNotFoundError, PermissionError):  # it is gone by now, or is another user's process
        return False
    except ProcessLookupError:
        pass
    return True


def _save_tensors(tensors: dict[str, Tensor], path: Path, directory: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"could not write the weights to {directory}: {error}; nothing there was changed") from error


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's config file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or has no whole ``model_cfg``.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {directory}; expected a directory that clipup or open_clip saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{path} has no model_cfg, which describes the model")
    missing = [field for field in _MODEL_FIELDS if field not in model_cfg]
    if missing:
        raise ValueError(f"model_cfg in {path} lacks {', '.join(missing)}")
    return config


def read_moe_config(directory: str | Path) -> MoEConfig | None:
    """The directory's ``moe_cfg``, None for a dense model."""
    values = read_config(directory).get("moe_cfg")
    if values is None:
        return None
    try:
        return MoEConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{Path(directory) / CONFIG_NAME}: {error}") from error


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The directory's state dict, on the CPU."""
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False builds the model without")
    return read_safetensors(path)


def types_of_weights(directory: str | Path) -> dict[str, torch.dtype]:
    """The types of the directory's tensors by name, where they are safetensors, of a dense model too."""
    path = Path(directory) / WEIGHTS_NAME
    return types_in_safetensors(path) if path.is_file() else {}


def check_fit(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    ignore: tuple[str, ...] = (),
    described_by: str = f"its {CONFIG_NAME}",
) -> None:
    """Compares a state dict with a model's, by names, shapes and kinds of types, before anything is copied.

    Args:
        source: where the weights come from. described_by: what says which model is meant; both for the message.

    Raises:
        ValueError: naming the parameters (up to three of each kind), both shapes, and what to do.
    """
    expected = model.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    faults = [
        f"{name} is {list(weights[name].shape)} there, {list(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in weights and name not in ignore and weights[name].shape != tensor.shape
    ]
    faults = faults[:_SHOWN] + [f"{len(faults) - _SHOWN} more of another shape"] * (len(faults) > _SHOWN)
    faults += _other_types(expected, {name: tensor.dtype for name, tensor in weights.items()})
    faults += _names("missing there", [name for name in expected if name not in weights])
    faults += _names("unknown to the model", [name for name in weights if name not in expected])
    if faults:
        raise ValueError(
            f"the weights in {source} do not fit the model that {described_by} describes: {'; '.join(faults)}. "
            "Put back the config that they were saved with, or save the model again"
        )


def check_types(model: nn.Module, types: Mapping[str, torch.dtype], source: str) -> None:
    """Refuses weights that torch would convert without a word: integers, truth values and complex numbers in the place
    of floating-point numbers, or the other way round.

    Args:
        types: those of the file's tensors, by name; names that the model does not have are left to others.

    Raises:
        ValueError: naming up to three parameters, and both types.
    """
    faults = _other_types(model.state_dict(), types)
    if faults:
        raise ValueError(
            f"the weights in {source} do not fit the model: {'; '.join(faults)}. Get them in a floating-point type"
        )


def _other_types(expected: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> list[str]:
    faults = [
        f"{name} is {types[name]} there, {tensor.dtype} in the model"
        for name, tensor in expected.items()
        if name in types and types[name].is_floating_point != tensor.dtype.is_floating_point
    ]
    return faults[:_SHOWN] + [f"{len(faults) - _SHOWN} more of another type"] * (len(faults) > _SHOWN)


def _names(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{kind}: {', '.join(names[:_SHOWN])}{rest}"]
