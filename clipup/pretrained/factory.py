"""Creates open_clip models, dense and sparse, and loads weights into them."""

from __future__ import annotations

import logging
import pickle
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import open_clip
import safetensors
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from .. import checks
from ..clip import towers
from ..moe.config import MoEConfig
from ..upcycling.upcycle import upcycle
from . import architecture, hub, model_directory, skeleton, tokenizers
from .config_files import check_depth, moe_config_in
from .model_names import LOCAL_PREFIX, check_known, directory_of, get_model_config, hub_access
from .state_dicts import Weights, check_fit, check_types, read_weights
from .structure import assign_weights, drop_parameters, without_random_numbers
from .timm_size import is_resized, resize_tower

LOG = logging.getLogger("clipup.pretrained")
LOG.setLevel(logging.WARNING)  # also in commands that log errors only: what they print depends on it
_NUMPY = (".npz", ".npy")  # weights of big_vision, which open_clip reads
_TRANSFORM = ("mean", "std", "interpolation", "resize_mode")
_FORCED_SIZES = {"vision_cfg.image_size": "force_image_size", "text_cfg.context_length": "force_context_length"}
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
    fill_color = None
    directory = directory_of(model_name) or _hub_directory(model_name, load_weights, kwargs.get("cache_dir"))
    if directory is not None:
        if pretrained:
            raise ValueError(
                f"pretrained={pretrained!r} cannot be used with the directory {directory}, which has its own weights"
            )
        found = model_directory.read_moe_config(directory)
        model_name = f"{LOCAL_PREFIX}{directory}"
        if load_weights and found is None:
            model_directory.check_weights(directory)
        stored = model_directory.weights_on_meta(directory) if load_weights else {}
        described = model_directory.read_config(directory)["model_cfg"]
        if stored:
            check_depth(described, len(stored), directory / model_directory.CONFIG_NAME)
        read_here = load_weights and (found is not None or is_resized(described, stored))
        weights = model_directory.read_weights(directory) if read_here else None
        described_by = f"its {model_directory.CONFIG_NAME}"
    else:
        check_known(model_name, pretrained)
        file = _file_of_weights(model_name, pretrained)
        found = _config_of_file(file, pretrained, moe_cfg)
        if file is not None:
            kwargs = _as_trained(file, model_name, str(pretrained), kwargs)
            fill_color = _preprocess_cfg(file, str(pretrained)).get("fill_color")
        weights = file.state_dict if found is not None and load_weights else None
        stored = file.on_meta() if file is not None and load_weights else {}
        del file  # open_clip reads dense weights itself
        described = None
        described_by = f"{model_name} with its moe_cfg"
    if moe_cfg is not None and found != moe_cfg:
        raise ValueError(
            "moe_cfg does not apply here: it is only for files with sparse weights but without their config. To make a "
            "dense model sparse, use clipup.upcycle"
        )
    if found is None and weights is None:
        if model_name.startswith(hub.HUB_PREFIX) and load_weights:
            kwargs = {"require_pretrained": True, **kwargs}
        with _clear_errors(model_name):
            model, *transforms = open_clip.create_model_and_transforms(model_name, pretrained, **kwargs)
        check_types(model, stored, str(pretrained or directory))
        _say_resized(model, stored, str(pretrained or directory))
        return model, *_with_fill_color(model, transforms, fill_color, kwargs.get("aug_cfg"))
    if kwargs.get("jit"):
        raise ValueError("jit=True is not supported for sparse models; use torch.compile")
    dense_kwargs = {**kwargs, "load_weights": False, "pretrained_image": False, "pretrained_text": False}
    initialization = nullcontext() if weights is None else without_random_numbers()
    with _clear_errors(model_name), expecting_random_weights(), initialization:
        model, *transforms = open_clip.create_model_and_transforms(model_name, **dense_kwargs)
    transforms = _with_fill_color(model, transforms, fill_color, kwargs.get("aug_cfg"))
    if weights is None:
        assert found is not None
        return upcycle(model, found, inplace=True), *transforms
    if described is not None:
        resize_tower(model, described, weights)
    drop_parameters(model)
    if found is not None:
        upcycle(model, found, inplace=True)
    with _clear_errors(model_name):
        weights = _fitting(model, weights, str(pretrained or directory), described_by)
    assign_weights(model, weights, kwargs.get("device", "cpu"))
    if kwargs.get("force_image_size") is not None and described is not None:
        resize_tower(model, architecture.overridden(described, kwargs), {})
    return model, *transforms


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads weights into a dense or sparse model of the same architecture. Position embeddings are resized.

    Of a checkpoint that holds its model's configs, those are compared with the model too.

    Args:
        model: of open_clip or timm, dense or sparse; modified in place.
        path: safetensors, a state dict, or a checkpoint of open_clip's or clipup's trainer, sharded or not, with or
            without "module." prefixes. No code in it is executed.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit, the file's configs are those of another function, or it contains more than
            weights. The model is unchanged.
    """
    checks.module("model", model)
    file = read_weights(path)
    check_configs(model, file.configs, path)
    load_state_dict(model, file.state_dict, str(path))


def check_configs(model: nn.Module, configs: dict[str, Any], path: str | Path) -> None:
    """Refuses weights of sparse layers that route otherwise, and of a model with other activations, heads or masks:
    they would fit. Checkpoints of earlier versions, which lack ``tokenizer_files``, have the config of their model's
    name also where force_quick_gelu created it, so activations are left out.

    Args:
        configs: of the checkpoint with the weights (``Weights.configs``).
        path: of the checkpoint, for messages.

    Raises:
        ValueError: the configs are those of another function, or not valid.
    """
    trained, own = moe_config_in(configs, Path(path)), getattr(model, "moe_config", None)
    if trained is not None and own is not None:
        fields = trained.differing(own)
        if fields:
            says = ", ".join(f"{name}={getattr(trained, name)!r}" for name in fields)
            is_own = ", ".join(f"{name}={getattr(own, name)!r}" for name in fields)
            raise ValueError(
                f"{path} was trained with {says}, the model has {is_own}; upcycle the model with the moe_cfg of the "
                "checkpoint, or make a model directory of it with clipup convert"
            )
    model_cfg = configs.get("model_cfg")
    if model_cfg is None or towers.is_timm(model):
        return
    model_directory.check_model_cfg(model_cfg, Path(path))
    says_activations = "tokenizer_files" in configs
    if not says_activations:
        LOG.warning("%s is of an earlier version, so activations are not compared with the model's", path)
    found = skeleton.differences(model, model_cfg, own, weights_replaced=True, activations=says_activations)
    if found:
        raise ValueError(
            f"{path} was trained as another model than the one that is given: {found[0]}; create the model as its run "
            "did, or make a model directory of the checkpoint with clipup convert"
        )


def load_state_dict(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """``load_checkpoint`` for weights that have been read.

    Args:
        source: where they come from, for error messages.
    """
    model.load_state_dict(_fitting(model, weights, source, f"a {type(model).__name__} with these options"))


def _fitting(model: nn.Module, weights: dict[str, Tensor], source: str, described_by: str) -> dict[str, Tensor]:
    """The weights, with position embeddings resized for the model. Raises ``ValueError`` if they do not fit."""
    check_fit(model, weights, source, _POSITION_EMBEDDINGS, described_by=described_by)
    _say_resized(model, weights, source)
    weights = dict(weights)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    check_fit(model, weights, source, described_by=described_by)
    return weights


def _say_resized(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Logs in one line which position embeddings are resized, because the model has other sizes than the weights."""
    resized = [
        f"{name} from {list(old.shape)} to {list(new.shape)}"
        for name, new in model.state_dict().items()
        if name in _POSITION_EMBEDDINGS
        and (old := weights.get(name, weights.get(name.removeprefix("text.")))) is not None
        and old.shape != new.shape
    ]
    if resized:
        LOG.warning("the weights in %s are of other sizes than the model; resized %s", source, ", ".join(resized))


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
    found = moe_config_in(file.configs, Path(str(path)))
    if found is None and given is None:
        raise ValueError(
            f"{path} has sparse layers but no config of them; pass moe_cfg, the MoEConfig that they were upcycled with"
        )
    return found or given


def _as_trained(file: Weights, model_name: str, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's arguments, completed by what a training checkpoint says: the transform of its images, and whether
    its model has a logit bias.

    Raises:
        ValueError: it was trained as another model than that of the name, or with another tokenizer.
    """
    preprocess = _preprocess_cfg(file, path)
    own = {f"image_{name}": preprocess[name] for name in _TRANSFORM if preprocess.get(name) is not None}
    if "logit_bias" in file.state_dict:
        own["init_logit_bias"] = 0.0  # replaced by the file's
    if file.configs.get("model_cfg") is not None:
        model_directory.check_model_cfg(file.configs["model_cfg"], Path(path))
        named = get_model_config(model_name)
        _check_architecture(file.configs["model_cfg"], named, model_name, path, kwargs)
        trained = tokenizers.saved_in(file.configs, path)
        if trained is not None and trained != tokenizers.files_of(named["text_cfg"], None):
            raise ValueError(
                f"pretrained={path!r} was trained with a tokenizer of its own, unlike {model_name}; make a model "
                "directory with clipup convert and name that instead"
            )
    return {**kwargs, **{name: value for name, value in own.items() if kwargs.get(name) is None}}


def _preprocess_cfg(file: Weights, path: str) -> dict[str, Any]:
    preprocess = file.configs.get("preprocess_cfg")
    model_directory.check_preprocess_cfg(preprocess, Path(path))
    return preprocess or {}


def _check_architecture(
    trained: dict[str, Any], named: dict[str, Any], model_name: str, path: str, kwargs: dict[str, Any]
) -> None:
    """Refuses to load, by a name, a checkpoint whose own config is that of another function. Sizes that the caller
    forces are not compared: position embeddings are resized for them."""
    found = architecture.differing(trained, architecture.overridden(named, kwargs))
    found = {field: values for field, values in found.items() if kwargs.get(_FORCED_SIZES.get(field, "")) is None}
    if not found:
        return
    says = ", ".join(f"{field}={checks.shown(value)}" for field, (value, _) in found.items())
    is_named = ", ".join(checks.shown(value) for _, value in found.values())
    ways = []
    for field, (value, _) in found.items():
        if field == "quick_gelu":
            ways.append("force_quick_gelu=True" if value else "a name without -quickgelu")
        elif field in _FORCED_SIZES:
            ways.append(f"{_FORCED_SIZES[field]}={value!r}")
    way = f"use {' and '.join(ways)}, or " if len(ways) == len(found) else ""
    raise ValueError(
        f"pretrained={path!r} was trained with {says}, unlike {model_name} ({is_named}); {way}make a model directory "
        "with clipup convert and name that instead"
    )


def _with_fill_color(model: Any, transforms: list[Any], color: Any, aug_cfg: Any) -> list[Any]:
    """The transforms with the color of a checkpoint's padding, which open_clip's factory has no argument for."""
    if color is None:
        return transforms
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, "fill_color": color}
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    return [
        image_transform_v2(preprocess, is_train=True, aug_cfg=aug_cfg),
        image_transform_v2(preprocess, is_train=False),
    ]


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
    AssertionError about widths, those of options that give no model (a division by zero, an unknown key; of a config
    that was read, also of a wrong type), SafetensorError, and UnpicklingError about files that contain code."""
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
    except (TypeError, ValueError) as error:
        directory = model_name.removeprefix(LOCAL_PREFIX)
        if not model_name.startswith((LOCAL_PREFIX, hub.HUB_PREFIX)) or directory in str(error):
            raise
        raise ValueError(f"open_clip could not create {model_name}: {type(error).__name__}: {error}") from error
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
    return hub.suppress_log_lines(hub.OF_RANDOM_WEIGHTS)
