"""``save_pretrained``: writes a model directory in open_clip's hub format, with ``moe_cfg`` beside ``model_cfg``.

    DIR/open_clip_config.json         {"model_cfg": ..., "preprocess_cfg": ..., "moe_cfg": ...}
    DIR/open_clip_model.safetensors   the state dict
    DIR/README.md                     the model card
    DIR/vocabulary.txt                only for models with a word tokenizer (``clipup.clip.word_tokenizer``)
    DIR/tokenizer.json, ...           only for models whose own directory has a Hugging Face tokenizer

For a timm model, timm's two files replace open_clip's (``clipup.pretrained.timm_directory``). The files are replaced
atomically. ``huggingface_hub.upload_folder`` can push the directory. open_clip itself can load a dense model from it;
it refuses the weights of a sparse one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .. import checks
from ..atomic_files import replace_files
from ..clip import towers, word_tokenizer
from ..dense.prepared import Prepared
from ..moe.layer import moe_layers
from . import model_card, timm_directory, tokenizers
from .model_directory import CONFIG_NAME, MODEL_FIELDS, WEIGHTS_NAME
from .model_names import LOCAL_PREFIX
from .skeleton import check_describes

_PREPROCESS_FIELDS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    model_cfg: dict[str, Any] | None = None,
    preprocess_cfg: dict[str, Any] | None = None,
    license: str = "other",
    base_model: str | None = None,
    tokenizer_directory: str | Path | None = None,
) -> None:
    """Saves a dense or upcycled model with a model card.

    Load it with ``clipup.create_model_and_transforms(directory)``, a timm model with
    ``clipup.create_timm_model(directory)``.

    Args:
        model: a model from ``clipup.upcycle``, open_clip or timm, not wrapped.
        directory: created if it does not exist. A model and card in it are replaced, or unchanged if writing fails.
        model_cfg: open_clip's architecture config, as returned by ``clipup.get_model_config(name)``. For a timm model:
            arguments of ``timm.create_model`` that timm does not record itself.
        preprocess_cfg: mean, std, interpolation, resize_mode, fill_color. None means those that open_clip attached to
            the model.
        license: license of the weights for the card, as the hub names it (mit, apache-2.0, ...).
        base_model: hub name ORG/NAME of the model that this one was made from, for the card.
        tokenizer_directory: a model directory that this model was made from: its tokenizer's files (``vocabulary.txt``,
            or those of Hugging Face) are copied. Without it, the tokenizer is found by the name in ``model_cfg``.

    Raises:
        ValueError: ``model_cfg`` is incomplete or describes another model, the model has sparse layers but no
            ``moe_config``, it was prepared for inference, its vocabulary has another size than the model's, or the
            directory holds another tokenizer and ``tokenizer_directory`` does not say which is the model's.
        FileNotFoundError: there is no ``tokenizer_directory``.
        OSError: a file could not be written, or a directory has the name of one.
    """
    files = None
    if tokenizer_directory is not None:
        source = Path(str(tokenizer_directory).removeprefix(LOCAL_PREFIX))
        if not source.is_dir():
            raise FileNotFoundError(
                f"tokenizer_directory: there is no directory {source}; expected that of the model which this one was "
                "made from"
            )
        files = tokenizers.files_of((model_cfg or {}).get("text_cfg") or {}, source)
    save_with_tokenizer(model, directory, model_cfg, files, preprocess_cfg, license, base_model)


def save_with_tokenizer(
    model: nn.Module,
    directory: str | Path,
    model_cfg: dict[str, Any] | None,
    tokenizer_files: dict[str, bytes] | None,
    preprocess_cfg: dict[str, Any] | None = None,
    license: str = "other",
    base_model: str | None = None,
) -> None:
    """``save_pretrained`` with the content of the tokenizer's files.

    Args:
        tokenizer_files: by name (``tokenizers.files_of``); files in the directory from which ``model_cfg`` would make
            another tokenizer are removed. None: the tokenizer that ``model_cfg`` names.

    Raises:
        ValueError: as in ``save_pretrained``, or the directory's ``config.json`` is of another kind of tokenizer.
    """
    checks.module("model", model)
    prepared = [module for module in model.modules() if isinstance(module, Prepared)]
    if prepared:
        quantized = any(module.quantize is not None for module in prepared)
        raise ValueError(
            "the model was prepared by clipup.accelerate; save the plain model"
            + (", from which this one was quantized" if quantized else ", or load this one's state_dict() into it")
        )
    moe_config = getattr(model, "moe_config", None)
    if moe_config is None and moe_layers(model):
        raise ValueError(
            "the model has sparse layers but no moe_config, so it could not be loaded again; use clipup.upcycle"
        )
    library = "timm" if towers.is_timm(model) else "open_clip"
    if library == "timm":
        names = timm_directory.CONFIG_NAME, timm_directory.WEIGHTS_NAME
        config = timm_directory.config_of(model, model_cfg)
    else:
        names = CONFIG_NAME, WEIGHTS_NAME
        config = _open_clip_config(model, model_cfg, preprocess_cfg)
        check_describes(model, config["model_cfg"], moe_config)
    if moe_config is not None:
        config["moe_cfg"] = moe_config.to_dict()
    text_cfg = config["model_cfg"]["text_cfg"] if library == "open_clip" else {}
    needs_transformers = "hf_model_name" in text_cfg or "hf_tokenizer_name" in text_cfg
    extra = "hf" if needs_transformers and not word_tokenizer.uses_words(text_cfg) else None
    texts = {model_card.README: model_card.model_card(model, library, license, base_model, extra)}
    directory = Path(directory)
    files = tokenizers.files_of(text_cfg, None) if tokenizer_files is None else tokenizer_files
    if tokenizer_files is None and library == "open_clip":
        _check_tokenizer_in(directory, files, text_cfg)
    if library == "open_clip":
        files = tokenizers.without_kind(files, directory)
    tensors = _tensors(model)
    directory.mkdir(parents=True, exist_ok=True)
    writers: dict[Path, Callable[[Path], object]] = {
        directory / names[1]: lambda path: _save_tensors(tensors, path, directory)
    }
    for name, content in {**files, **{name: text.encode("utf-8") for name, text in texts.items()}}.items():
        writers[directory / name] = partial(_write, content)
    former = [directory / name for name in tokenizers.file_names(text_cfg) if name not in files]
    content = (json.dumps(config, indent=2) + "\n").encode("utf-8")
    writers[directory / names[0]] = partial(_write_last, content, former)  # it marks a complete directory
    replace_files(writers)


def _write_last(content: bytes, former: list[Path], path: Path) -> None:
    """Writes the config, and then removes the files of a former tokenizer from its directory, after the former config:
    a kill before all is in place leaves no model with a tokenizer that is not its own."""
    _write(content, path)
    found = [file for file in former if file.is_file() or file.is_symlink()]
    if found:
        (found[0].parent / path.name).unlink(missing_ok=True)
    for file in found:
        file.unlink()


def _check_tokenizer_in(directory: Path, files: dict[str, bytes], text_cfg: dict[str, Any]) -> None:
    """Refuses a directory from which this config would make another tokenizer than that of these files: it may be the
    model's own, or a former one's."""
    for name in tokenizers.file_names(text_cfg):
        path = directory / name
        if path.is_file() and path.read_bytes() != files.get(name):
            raise ValueError(
                f"directory: {directory} holds a tokenizer ({name}) that is not the one which model_cfg names; pass it "
                "as tokenizer_directory too, if the tokenizer is the model's, or remove the file"
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, without shared memory, which safetensors refuses: tied parameters become copies."""
    tensors, storages = {}, set()
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors


def _open_clip_config(
    model: nn.Module, model_cfg: dict[str, Any] | None, preprocess_cfg: dict[str, Any] | None
) -> dict[str, Any]:
    missing = [field for field in MODEL_FIELDS if field not in (model_cfg or {})]
    if missing:
        raise ValueError(f"model_cfg lacks {', '.join(missing)}; pass clipup.get_model_config(name)")
    if preprocess_cfg is None:
        preprocess_cfg = getattr(getattr(model, "visual", None), "preprocess_cfg", {})
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_fields(preprocess_cfg)}


def preprocess_fields(preprocess_cfg: dict[str, Any]) -> dict[str, Any]:
    """Those of open_clip's transform of images that belong to a saved model."""
    return {name: preprocess_cfg[name] for name in _PREPROCESS_FIELDS if name in preprocess_cfg}


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _save_tensors(tensors: dict[str, Tensor], path: Path, directory: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"could not write the weights to {directory}: {error}; nothing there was changed") from error
