"""Creates open_clip models, dense and sparse, and loads weights into them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torchvision.transforms import Compose

from .. import checks
from ..clip import towers
from ..data.images import to_rgb
from ..inference.int8_tensors import PRECISIONS, int8_dtype
from ..moe.config import MoEConfig
from ..moe.layer import saved_config
from ..upcycling.upcycle import upcycle
from . import architecture, int8_files, tokenizers
from .hub import expecting_random_weights as expecting_random_weights
from .known_models import HUB_PREFIX, LOCAL_PREFIX
from .model_directory import INT8, WEIGHTS_NAME, moe_config_in, read_config
from .model_names import check_known, directory_of, get_model_config, hub_access, own_directory_on_hub
from .state_dicts import (
    Weights,
    assign_weights,
    check_tensors,
    drop_parameters,
    read_safetensors,
    read_weights,
    without_random_numbers,
)

LOG = logging.getLogger("clipup.models")
LOG.setLevel(logging.WARNING)  # also in commands that log errors only: what they print depends on it
_NUMPY = (".npz", ".npy")  # weights of big_vision, which open_clip reads
_TRANSFORM = ("mean", "std", "interpolation", "resize_mode")
_FORCED_SIZES = {"vision_cfg.image_size": "force_image_size", "text_cfg.context_length": "force_context_length"}
_NAME_THE_RUN = (
    "give the directory of the run as the model (clipup convert makes one of a checkpoint, also of a run that is not "
    "finished)"
)
_POSITION_EMBEDDINGS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")

if TYPE_CHECKING:

    class CLIP(nn.Module):
        """What open_clip's models have in common, for type checkers: the classes have no common base with types."""

        visual: nn.Module
        logit_scale: nn.Parameter

        def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
            """[B, 3, height, width] -> features [B, F]."""

        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            """Token ids [B, context_length] -> features [B, F]."""


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *, moe_cfg: MoEConfig | None = None, **kwargs: Any
) -> tuple[CLIP, Any, Any]:
    """open_clip's function of the same name, which also loads sparse models: those saved by ``clipup.save_pretrained``,
    from a directory or the hub, and training checkpoints.

    Unlike open_clip's, the model is in evaluation mode, in which no tokens are dropped and ``clipup.aux_loss`` is 0:
    call ``model.train()`` before training it.

    Args:
        model_name: an open_clip model name, a directory with an ``open_clip_config.json`` (``"DIR"`` or
            ``"local-dir:DIR"``), or ``"hf-hub:ORG/NAME"``. Model names take precedence over directories.
        pretrained: a tag or file, for an open_clip model name: safetensors, a state dict, or a checkpoint of
            open_clip's or clipup's trainer. A directory has its own weights.
        moe_cfg: the config of the sparse layers, if ``pretrained`` is a file with sparse layers but without a config.
        kwargs: passed to open_clip, such as device, precision, load_weights and force_image_size.

    Returns:
        model, preprocess_train, preprocess_val. A sparse model has its config as ``moe_config``. The transforms are
        open_clip's, after one step that makes an image RGB (``clipup.data.images.to_rgb``): ``preprocess(Image.open(
        path))`` is what training, evaluation and search read, also of 16-bit, transparent and palette images. Without
        it, PIL would resize these first, in another way than open_clip's trainer, which makes them RGB first.

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
    # open_clip 4 has also factories of transforms, for NaFlex
    return model.eval(), *(Compose([to_rgb, *t.transforms]) if isinstance(t, Compose) else t for t in transforms)


def _create(
    model_name: str, pretrained: str | None, moe_cfg: MoEConfig | None, kwargs: dict[str, Any]
) -> tuple[CLIP, Any, Any]:
    check_known(model_name, pretrained)
    load_weights, cache_dir = kwargs.get("load_weights", True), kwargs.get("cache_dir")
    directory = directory_of(model_name) or own_directory_on_hub(model_name, load_weights, cache_dir)
    model_cfg = fill_color = None
    if directory is None:
        file = _file_of_weights(model_name, pretrained)
        moe_config = _config_of_file(file, pretrained, moe_cfg)
        kwargs = _as_trained(file, model_name, str(pretrained), kwargs)
        weights = file.state_dict if load_weights else {}
        fill_color = (file.configs.get("preprocess_cfg") or {}).get("fill_color")
    else:
        model_name, config, path = f"{LOCAL_PREFIX}{directory}", read_config(directory), directory / WEIGHTS_NAME
        model_cfg, moe_config = config["model_cfg"], moe_config_in(config)
        reads = load_weights and INT8 not in config and (moe_config is not None or path.is_file())
        weights = read_safetensors(path) if reads else {}
    if moe_cfg is not None and moe_config != moe_cfg:
        raise ValueError(
            "moe_cfg does not apply here: it is only for files with sparse weights but without their config. To make a "
            "dense model sparse, use clipup.upcycle"
        )
    if directory is not None and load_weights and INT8 in config:
        return _create_int8(model_name, directory, config, dict(kwargs))
    source = pretrained or str(directory or model_name)
    if moe_config is not None or (model_cfg is not None and architecture.is_resized(model_cfg)):
        model, *transforms = _create_and_load(model_name, source, weights, model_cfg, moe_config, kwargs)
    else:  # open_clip finds and loads the weights
        required = load_weights and model_name.startswith((LOCAL_PREFIX, HUB_PREFIX))
        with _clear_errors(model_name):
            model, *transforms = open_clip.create_model_and_transforms(
                model_name, pretrained, **{"require_pretrained": required, **kwargs}
            )
        _log_resized(model, weights, source)
    return model, *_with_fill_color(model, transforms, fill_color, kwargs.get("aug_cfg"))


def _create_int8(model_name: str, directory: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The model of a directory in int8, without its plain weights at any time."""
    int8_dtype(config[INT8], str(directory))
    made_for = {"device": "cpu", "precision": PRECISIONS[config[INT8]["dtype"]]}
    for argument in (*made_for, *architecture.FORCED):
        only, given = made_for.get(argument), kwargs.pop(argument, None)
        if given not in (None, False) and str(given) != only:
            raise ValueError(
                f"{argument} is {given!r}, but the int8 weights in {directory} were made "
                f"{f'for {only!r}: pass that' if only else 'without it: leave it out'}, or take the plain model"
            )
    weights = read_safetensors(directory / WEIGHTS_NAME)
    off = ("load_weights", "require_pretrained", "pretrained_image", "pretrained_text")
    made = {"device": "meta", "precision": config[INT8].get("precision", "fp32")}
    with torch.device("meta"), expecting_random_weights():
        model, *transforms = _create(model_name, None, None, kwargs | dict.fromkeys(off, False) | made)
    architecture.resize_tower(model, config["model_cfg"], weights)
    return int8_files.load_int8(model, config[INT8], weights, str(directory)), *transforms


def _create_and_load(
    model_name: str,
    source: str,
    weights: dict[str, Tensor],
    model_cfg: dict[str, Any] | None,
    moe_config: MoEConfig | None,
    kwargs: dict[str, Any],
) -> Any:
    """A sparse model, or one of another image size than its tower of timm is made for: open_clip creates it without
    weights, and ``weights`` are loaded once it has its form.

    Args:
        source: where the weights are, for messages.
        weights: empty for random weights.
        model_cfg: of a directory.
    """
    kwargs = {**kwargs, "load_weights": False, "pretrained_image": False, "pretrained_text": False}
    kwargs["require_pretrained"] = kwargs.get("require_pretrained", False) and not weights
    initialization = without_random_numbers() if weights else nullcontext()
    with _clear_errors(model_name), expecting_random_weights(), initialization:
        model, *transforms = open_clip.create_model_and_transforms(model_name, **kwargs)
    if weights:
        if model_cfg is not None:
            architecture.resize_tower(model, model_cfg, weights)
        drop_parameters(model)
    if moe_config is not None:
        upcycle(model, moe_config, inplace=True)
    if weights:
        with _clear_errors(model_name):
            fitting = _fitting(model, weights, source)
        assign_weights(model, fitting, kwargs.get("device", "cpu"))
    if kwargs.get("force_image_size") is not None and model_cfg is not None:
        architecture.resize_tower(model, architecture.overridden(model_cfg, kwargs), {})
    return model, *transforms


def name_and_weights(
    model_name: str | None, pretrained: str | None, argument: str = "pretrained"
) -> tuple[str, str | None]:
    """The arguments of ``create_model_and_transforms`` for a command, which also takes the directory of a model or of a
    finished run as the weights.

    Args:
        model_name: may be None with a directory.
        argument: what messages call ``pretrained``.

    Raises:
        ValueError: the weights are neither known nor a file, or those of another model.
        FileNotFoundError: the directory holds no model.
    """
    if pretrained is None or not Path(pretrained).is_dir():
        assert model_name is not None
        check_known(model_name, pretrained, argument)
        return model_name, pretrained
    try:
        model_cfg = get_model_config(pretrained)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{argument}: {error}") from error
    if differing := architecture.differing(model_cfg, get_model_config(model_name or pretrained)):
        raise ValueError(
            f"{argument}={pretrained!r} holds another architecture than {model_name!r} ({', '.join(differing)}); give "
            "the directory as the model"
        )
    return pretrained, None


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads weights into a dense or sparse model of the same architecture. Position embeddings are resized. Of a
    checkpoint that holds its model's configs, those are compared with the model too.

    Args:
        model: of open_clip or timm, dense or sparse; modified in place.
        path: safetensors, a state dict, or a checkpoint of open_clip's or clipup's trainer, sharded or not, with or
            without "module." prefixes. No code in it is executed.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: the file does not exist.
        ValueError: the weights do not fit, the file's configs are those of another function, it contains more than
            weights, or ``clipup.accelerate`` prepared the model. The model is unchanged.
    """
    checks.plain_weights("model", model)
    file = read_weights(path)
    check_configs(model, file.configs, path)
    load_state_dict(model, file.state_dict, str(path))


def check_configs(model: nn.Module, configs: dict[str, Any], path: str | Path) -> None:
    """Refuses weights of sparse layers that route otherwise, and of a model with other activations, heads or masks:
    they would fit.

    Args:
        configs: of the checkpoint with the weights (``Weights.configs``).
        path: of the checkpoint, for messages.

    Raises:
        ValueError: the configs are those of another function, or not valid.
    """
    trained, own = moe_config_in(configs), saved_config(model)
    if trained is not None and own is not None and (fields := trained.differing(own)):
        raise ValueError(
            f"{path} was trained with another moe_cfg than the model has ({', '.join(fields)}); upcycle the model "
            "with that of the checkpoint, or make a model directory of it with clipup convert"
        )
    model_cfg = configs.get("model_cfg")
    if model_cfg is None or towers.is_timm(model):
        return
    if differences := architecture.differences(model, model_cfg, own, sizes=False):
        raise ValueError(
            f"{path} was trained as another model than the one that is given: {differences[0]}; create the model as "
            "its run did, or make a model directory of the checkpoint with clipup convert"
        )


def load_state_dict(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """``load_checkpoint`` for weights that have been read.

    Args:
        source: where they come from, for error messages.
    """
    model.load_state_dict(_fitting(model, weights, source))


def _fitting(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights, with position embeddings resized for the model. Raises ``ValueError`` if they do not fit."""
    check_tensors(model.state_dict(), weights, source, _POSITION_EMBEDDINGS)
    _log_resized(model, weights, source)
    weights = dict(weights)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    check_tensors(model.state_dict(), weights, source)
    return weights


def _log_resized(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
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


def _file_of_weights(model_name: str, pretrained: str | None) -> Weights:
    """The weights in the file ``pretrained``; none if it is not a file, or a NumPy file.

    Dense files are loaded by open_clip, but read here as well, for their configs.
    """
    is_tag = bool(pretrained) and open_clip.get_pretrained_cfg(model_name, pretrained) != {}
    if not pretrained or is_tag or Path(pretrained).suffix in _NUMPY:
        return Weights({})
    return read_weights(pretrained)


def _config_of_file(file: Weights, path: str | None, given: MoEConfig | None) -> MoEConfig | None:
    if not file.sparse:
        return None
    config = moe_config_in(file.configs) or given
    if config is None:
        raise ValueError(
            f"{path} has sparse layers but no config of them; pass moe_cfg, the MoEConfig that they were upcycled with"
        )
    return config


def _as_trained(file: Weights, model_name: str, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's arguments, completed by what a training checkpoint says: the transform of its images, and whether
    its model has a logit bias.

    Raises:
        ValueError: it was trained as another model than that of the name, or with another tokenizer.
    """
    preprocess = file.configs.get("preprocess_cfg") or {}
    own = {f"image_{name}": preprocess[name] for name in _TRANSFORM if preprocess.get(name) is not None}
    if "logit_bias" in file.state_dict:
        own["init_logit_bias"] = 0.0  # replaced by the file's
    if file.configs.get("model_cfg") is not None:
        named = get_model_config(model_name)
        _check_architecture(file.configs["model_cfg"], named, model_name, path, kwargs)
        trained = tokenizers.saved_in(file.configs, path)
        if trained is not None and trained != tokenizers.files_of(named["text_cfg"], None):
            raise ValueError(
                f"pretrained={path!r} was trained with a tokenizer of its own, unlike {model_name}; {_NAME_THE_RUN}"
            )
    return {**kwargs, **{name: value for name, value in own.items() if kwargs.get(name) is None}}


def _check_architecture(
    trained: dict[str, Any], named: dict[str, Any], model_name: str, path: str, kwargs: dict[str, Any]
) -> None:
    """Refuses to load, by a name, a checkpoint whose own config is that of another function. Sizes that the caller
    forces are not compared: position embeddings are resized for them."""
    differing = architecture.differing(trained, architecture.overridden(named, kwargs))
    differing = {name: pair for name, pair in differing.items() if kwargs.get(_FORCED_SIZES.get(name, "")) is None}
    if differing:
        its_own = ", ".join(f"{name}={checks.shown(value)}" for name, (value, _) in differing.items())
        of_name = ", ".join(checks.shown(value) for _, value in differing.values())
        raise ValueError(
            f"pretrained={path!r} was trained with {its_own}, unlike {model_name} ({of_name}); force an image size or "
            f"context length (force_image_size), or {_NAME_THE_RUN}"
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
    """Converts open_clip's errors about names, files, downloads and weights that do not fit into ValueErrors."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"open_clip could not create {model_name}: {checks.shown(str(error))}; do the weights belong to this model?"
        ) from error
