"""``save_pretrained``: writes a model directory in open_clip's hub format, with ``moe_cfg`` beside ``model_cfg``.

    DIR/open_clip_config.json         {"model_cfg": ..., "preprocess_cfg": ..., "moe_cfg": ...}
    DIR/open_clip_model.safetensors   the state dict
    DIR/README.md                     the model card
    DIR/vocabulary.txt                only for models with a word tokenizer (``clipup.clip.word_tokenizer``)
    DIR/tokenizer.json, ...           only for models whose own directory has a Hugging Face tokenizer

The config of a model in int8 has ``quantization_config``, and its tensors are those of
``clipup.inference.int8_tensors``.

For a timm model, timm's two files replace open_clip's (``clipup.models.timm_factory``). The files are replaced
atomically. ``huggingface_hub.upload_folder`` can push the directory. open_clip itself can load a dense model from it;
it refuses the weights of a sparse model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from open_clip.transformer import LayerNormFp32
from torch import Tensor, nn

from .. import checks
from ..atomic_files import replace_files
from ..clip import towers, word_tokenizer
from ..clip.hugging_face import is_hugging_face
from ..inference.int8_tensors import PRECISIONS, int8_config, int8_tensors
from ..inference.prepared import quantization
from ..moe.layer import moe_layers, saved_config
from . import architecture, int8_files, model_card, timm_factory, tokenizers
from .known_models import LOCAL_PREFIX
from .model_directory import CONFIG_NAME, INT8, WEIGHTS_NAME, check_model_cfg

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
    """Saves a dense or upcycled model with a model card, also one of open_clip that ``accelerate`` made in int8.

    Load it with ``clipup.create_model_and_transforms(directory)``, a timm model with
    ``clipup.create_timm_model(directory)``.

    Args:
        model: a model from ``clipup.upcycle``, open_clip or timm. A wrapper (``DistributedDataParallel``,
            ``AveragedModel``, ``torch.compile``) is removed.
        directory: created if it does not exist. A model and card in it are replaced, or unchanged if writing fails.
        model_cfg: open_clip's architecture config, as returned by ``clipup.get_model_config(name)``. For a timm model:
            arguments of ``timm.create_model`` that timm does not record itself.
        preprocess_cfg: mean, std, interpolation, resize_mode, fill_color. None means those that open_clip attached to
            the model.
        license: license of the weights for the card, as the hub names it (mit, apache-2.0, ...).
        base_model: hub name ORG/NAME of the model that this model was made from, for the card.
        tokenizer_directory: a model directory that this model was made from: its tokenizer's files (``vocabulary.txt``,
            or those of Hugging Face) are copied. Without it, the tokenizer is found by the name in ``model_cfg``.

    Raises:
        TypeError: a model of transformers, which has its own ``save_pretrained``.
        ValueError: ``model_cfg`` is incomplete or describes another model, the model has sparse layers but no
            ``moe_config``, or layers whose configs differ, it was prepared for inference but not in int8, its
            vocabulary has another size than the model's, or the directory holds another tokenizer.
        FileNotFoundError: there is no ``tokenizer_directory``.
        OSError: a file could not be written, or a directory has the name of one.
    """
    files = None
    if tokenizer_directory is not None:
        source = Path(str(tokenizer_directory).removeprefix(LOCAL_PREFIX))
        if not source.is_dir():
            raise FileNotFoundError(f"tokenizer_directory: there is no directory {source}")
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
    results: Iterable[dict[str, Any]] = (),
) -> None:
    """``save_pretrained`` with the content of the tokenizer's files.

    Args:
        tokenizer_files: by name (``tokenizers.files_of``). None: the tokenizer that ``model_cfg`` names.
        results: of evaluations, for the card (``model_card.with_results``).

    Raises:
        TypeError, ValueError: as in ``save_pretrained``.
    """
    checks.module("model", model)
    model = towers.unwrapped(model)
    if is_hugging_face(model):
        raise TypeError(f"model is a {type(model).__name__} of transformers: use its own save_pretrained(directory)")
    int8 = quantization(model) is not None and not towers.is_timm(model)
    if not int8:
        checks.plain_weights("model", model)
    moe_config = saved_config(model)
    if moe_config is None and moe_layers(model):
        raise ValueError(
            "the model has sparse layers but no moe_config, so it could not be loaded again; use clipup.upcycle"
        )
    plain = int8_files.plain_structure(model) if int8 else model
    library = "timm" if towers.is_timm(model) else "open_clip"
    text_cfg: dict[str, Any] = {}
    if library == "timm":
        names = timm_factory.CONFIG_NAME, timm_factory.WEIGHTS_NAME
        config = timm_factory.config_of(model, model_cfg)
    else:
        names = CONFIG_NAME, WEIGHTS_NAME
        check_model_cfg(model_cfg, "save_pretrained")
        if preprocess_cfg is None:
            preprocess_cfg = getattr(getattr(model, "visual", None), "preprocess_cfg", {})
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_fields(preprocess_cfg)}
        text_cfg = config["model_cfg"]["text_cfg"]
        architecture.check_describes(plain, config["model_cfg"], moe_config)
    if moe_config is not None:
        config["moe_cfg"] = moe_config.to_dict()
    if int8:
        config[INT8] = int8_config(model)
        if any(isinstance(module, LayerNormFp32) for module in model.modules()):  # open_clip's in half precision
            config[INT8]["precision"] = PRECISIONS[config[INT8]["dtype"]]
    needs_transformers = "hf_model_name" in text_cfg or "hf_tokenizer_name" in text_cfg
    extra = "hf" if needs_transformers and not word_tokenizer.uses_words(text_cfg) else None
    card = reduce(model_card.with_results, results, model_card.model_card(plain, library, license, base_model, extra))
    directory = Path(directory)
    files = tokenizers.files_of(text_cfg, None) if tokenizer_files is None else tokenizer_files
    _check_tokenizer_in(directory, files, text_cfg, replaces=tokenizer_files is not None)
    tensors = _unshared(int8_tensors(model) if int8 else model.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        **files,
        model_card.README: card.encode("utf-8"),
        names[0]: (json.dumps(config, indent=2) + "\n").encode("utf-8"),  # the last: it marks a complete directory
    }
    writers = {directory / name: partial(Path.write_bytes, data=content) for name, content in contents.items()}
    write_tensors = partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"})
    replace_files({directory / names[1]: write_tensors, **writers})


def _check_tokenizer_in(directory: Path, files: dict[str, bytes], text_cfg: dict[str, Any], replaces: bool) -> None:
    """Refuses a directory from which this config would make another tokenizer than that of these files: perhaps the
    model's own, perhaps a former model's.

    Args:
        replaces: files of the same names are replaced.
    """
    for name in tokenizers.file_names(text_cfg):
        path = directory / name
        if path.is_file() and path.read_bytes() != files.get(name) and not (replaces and name in files):
            raise ValueError(
                f"directory: {directory} holds a tokenizer ({name}) that is not the model's; if it is, pass the "
                "directory as tokenizer_directory too; otherwise choose another directory, or remove the file"
            )


def _unshared(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, without shared memory, which safetensors refuses: tied parameters become copies."""
    tensors, storages = {}, set()
    for name, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors


def preprocess_fields(preprocess_cfg: dict[str, Any]) -> dict[str, Any]:
    """Those of open_clip's transform of images that belong to a saved model."""
    return {name: preprocess_cfg[name] for name in _PREPROCESS_FIELDS if name in preprocess_cfg}
