"""Creates open_clip models, dense and sparse, and loads weights into them."""

from __future__ import annotations

import pickle
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import open_clip
import safetensors
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from .. import checks
from ..moe.config import MoEConfig
from ..upcycling.upcycle import upcycle
from . import hub, model_directory
from .config_files import check_depth
from .model_names import LOCAL_PREFIX, check_known, directory_of, hub_access
from .state_dicts import Weights, check_fit, check_types, read_weights
from .structure import assign_weights, drop_parameters, without_random_numbers

_NUMPY = (".npz", ".npy")  # weights of big_vision, which open_clip reads
_TRANSFORM = ("mean", "std", "interpolation", "resize_mode")
_POSITION_EMBEDDINGS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *, moe_cfg: MoEConfig | None = None, **kwargs: Any
) -> tuple[nn.Module, Any, Any]:
    """open_clip's function of the same name, which also loads sparse models: those saved by ``clipup.save_pretrained``,
    from a directory or the hub, and training checkpoints.

    The model is in evaluation mode, in which no tokens are dropped: call ``model.train()`` before training it.

    Args:
        model_name: an open_clip model name, a directory with an ``open_clip_config.json`` (``"DIR"`` or
            ``"local-dir:DIR"``), or ``"hf-hub:ORG/NAME"``. Model names take precedence over directories.
        pretrained: a tag or file, for an open_clip model name: safetensors, a state dict, or a checkpoint of
            open_clip's or clipup's trainer. A directory has its own weights.
        moe_cfg: the config of the sparse layers, if ``pretrained`` is a file with sparse layers but without a config.
        kwargs: passed to open_clip, such as device, precision, load_weights and force_image_size.

    Returns:
        model, preprocess_train, preprocess_val. A sparse model has its config as ``moe_config``.

    Raises:
        ValueError: an unknown name or tag, weights that do not fit the model, or a file with more than weights.
        FileNotFoundError: the directory lacks its config or weights, or the weights are not cached and cannot be
            downloaded.
        ImportError: a package that the text tower needs is not installed.
    """
    if not kwargs.get("weights_only", True):
        raise ValueError("weights_only=False would run code in the file; save its state dict alone instead")
    with hub_access(model_name, pretrained, "hf_model_name", kwargs.get("cache_dir")):
        model, *transforms = _create(model_name, pretrained, moe_cfg, kwargs)
    return model.eval(), *transforms


def _create(
    model_name: str, pretrained: str | None, moe_cfg: MoEConfig | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, Any, Any]:
    load_weights = kwargs.get("load_weights", True)
    directory = directory_of(model_name) or _hub_directory(model_name, load_weights, kwargs.get("cache_dir"))
    if directory is not None:
        if pretrained:
            raise ValueError(
                f"pretrained={pretrained!r} cannot be used with the directory {directory}, which has its own weights"
            )
        found = model_directory.read_moe_config(directory)
        model_name = f"{LOCAL_PREFIX}{directory}"
        weights = model_directory.read_weights(directory) if found is not None and load_weights else None
        if load_weights and found is None:
            model_directory.check_weights(directory)
        types = model_directory.types_of_weights(directory) if load_weights else {}
        if types:
            described = model_directory.read_config(directory)["model_cfg"]
            check_depth(described, len(types), directory / model_directory.CONFIG_NAME)
        described_by = f"its {model_directory.CONFIG_NAME}"
    else:
        check_known(model_name, pretrained)
        file = _file_of_weights(model_name, pretrained)
        found = _config_of_file(file, pretrained, moe_cfg)
        if file is not None:
            kwargs = _as_trained(file, model_name, str(pretrained), kwargs)
        weights = file.state_dict if found is not None and load_weights else None
        types = file.types if file is not None and load_weights else {}
        del file  # open_clip reads dense weights itself
        described_by = f"{model_name} with its moe_cfg"
    if moe_cfg is not None and found != moe_cfg:
        raise ValueError(
            "moe_cfg does not apply here: it is only for files with sparse weights but without their config. To make a "
            "dense model sparse, use clipup.upcycle"
        )
    if found is None:
        if model_name.startswith(hub.HUB_PREFIX) and load_weights:
            kwargs = {"require_pretrained": True, **kwargs}
        with _clear_errors(model_name):
            model, *transforms = open_clip.create_model_and_transforms(model_name, pretrained, **kwargs)
        check_types(model, types, str(pretrained or directory))
        return model, *transforms
    if kwargs.get("jit"):
        raise ValueError("jit=True is not supported for sparse models; use torch.compile")
    dense_kwargs = {**kwargs, "load_weights": False, "pretrained_image": False, "pretrained_text": False}
    initialization = nullcontext() if weights is None else without_random_numbers()
    with _clear_errors(model_name), expecting_random_weights(), initialization:
        model, *transforms = open_clip.create_model_and_transforms(model_name, **dense_kwargs)
    if weights is None:
        return upcycle(model, found, inplace=True), *transforms
    drop_parameters(model)
    upcycle(model, found, inplace=True)
    with _clear_errors(model_name):
        weights = _fitting(model, weights, str(pretrained or directory), described_by)
    assign_weights(model, weights, kwargs.get("device", "cpu"))
    return model, *transforms


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads weights into a dense or sparse model of the same architecture. Position embeddings are resized.

    Args:
        model: of open_clip or timm, dense or sparse; modified in place.
        path: safetensors, a state dict, or a checkpoint of open_clip's or clipup's trainer, sharded or not, with or
            without "module." prefixes. No code in it is executed.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit, or the file contains more than weights. The model is unchanged.
    """
    checks.module("model", model)
    load_state_dict(model, read_weights(path).state_dict, str(path))


def load_state_dict(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """``load_checkpoint`` for weights that have been read.

    Args:
        source: where they come from, for error messages.
    """
    model.load_state_dict(_fitting(model, weights, source, f"a {type(model).__name__} with these options"))


def _fitting(model: nn.Module, weights: dict[str, Tensor], source: str, described_by: str) -> dict[str, Tensor]:
    """The weights, with position embeddings resized for the model. Raises ``ValueError`` if they do not fit."""
    check_fit(model, weights, source, _POSITION_EMBEDDINGS, described_by=described_by)
    weights = dict(weights)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    check_fit(model, weights, source, described_by=described_by)
    return weights


def _hub_directory(model_name: str, load_weights: bool, cache_dir: str | None) -> Path | None:
    """The local directory of a sparse model on the hub; None for everything else, which open_clip loads."""
    if not model_name.startswith(hub.HUB_PREFIX):
        return None
    directory = hub.cached(model_name, model_directory.CONFIG_NAME, cache_dir=cache_dir)
    if model_directory.read_moe_config(directory) is None:
        return None
    files = [model_directory.CONFIG_NAME] + [model_directory.WEIGHTS_NAME] * load_weights
    return hub.cached(model_name, *files, cache_dir=cache_dir)


def _file_of_weights(model_name: str, pretrained: str | None) -> Weights | None:
    """The weights in the file ``pretrained``; None if it is not a file, or a NumPy file.

    Dense files are loaded by open_clip, but read here as well, to refuse code in them with a clear error.
    """
    is_tag = bool(pretrained) and open_clip.get_pretrained_cfg(model_name, pretrained) != {}
    if not pretrained or is_tag or Path(pretrained).suffix in _NUMPY:
        return None
    return read_weights(pretrained)


def _config_of_file(file: Weights | None, path: str | None, given: MoEConfig | None) -> MoEConfig | None:
    if file is None or not file.sparse:
        return None
    if file.moe_config is None and given is None:
        raise ValueError(
            f"{path} has sparse layers but no config of them; pass moe_cfg, the MoEConfig that they were upcycled with"
        )
    return file.moe_config or given


def _as_trained(file: Weights, model_name: str, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's arguments, completed by what a training checkpoint says: the transform of its images, and whether
    its model has a logit bias.

    Raises:
        ValueError: it was trained with another activation than that of the name.
    """
    preprocess = file.configs.get("preprocess_cfg") or {}
    own = {f"image_{name}": preprocess[name] for name in _TRANSFORM if preprocess.get(name) is not None}
    if "logit_bias" in file.state_dict:
        own["init_logit_bias"] = 0.0  # replaced by the file's
    model_cfg = file.configs.get("model_cfg")
    if isinstance(model_cfg, dict):
        trained = bool(model_cfg.get("quick_gelu"))
        named = bool((open_clip.get_model_config(model_name) or {}).get("quick_gelu"))
        if trained != (named or bool(kwargs.get("force_quick_gelu"))):
            way = "force_quick_gelu=True" if trained else "a name without -quickgelu"
            raise ValueError(
                f"pretrained={path!r} was trained with quick_gelu={trained}, unlike {model_name}; use {way}, or make a "
                "model directory with clipup convert and name that instead"
            )
    return {**kwargs, **{name: value for name, value in own.items() if kwargs.get(name) is None}}


def create_on_meta(model_name: str, **kwargs: Any) -> nn.Module:
    """The model of an open_clip name or a directory on the meta device: shapes without weights or memory for them.

    kwargs: as in ``create_model_and_transforms``.
    """
    kwargs = {"device": "meta", "load_weights": False, "pretrained_text": False, **kwargs}
    with torch.device("meta"), expecting_random_weights():
        return create_model_and_transforms(model_name, **kwargs)[0]


@contextmanager
def _clear_errors(model_name: str) -> Iterator[None]:
    """Converts open_clip's errors into one-line ValueErrors: RuntimeError about names, files and downloads,
    AssertionError about widths, those of options that give no model (a division by zero, an unknown key),
    SafetensorError, and UnpicklingError about files that contain code."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights of {model_name} contain more than tensors and plain values, and loading them would run code; "
            "nothing was run. Get them as safetensors"
        ) from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights of {model_name} cannot be read, the file is damaged: {error}") from error
    except (ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f"open_clip could not create {model_name}: {type(error).__name__}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        text = str(error) or (traceback.extract_tb(error.__traceback__)[-1].line or "")  # a bare assertion: its code
        lines = [textwrap.shorten(line, 200, placeholder=" ...") for line in text.splitlines() if line.strip()]
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        misfit = isinstance(error, AssertionError) or "state_dict" in str(error)
        hint = "; the weights belong to another model or config" if misfit else ""
        raise ValueError(f"open_clip could not create {model_name}: {' '.join(lines[:4])}{more}{hint}") from error


def expecting_random_weights() -> AbstractContextManager[None]:
    """Suppresses open_clip's warning about random weights where they are intended."""
    return hub.suppress_log_lines(("No pretrained weights loaded", "Local config loaded, but no CLIP weights found"))
