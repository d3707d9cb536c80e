"""Models and tokenizers of open_clip, how they are created, and what they take."""

from __future__ import annotations

import difflib
import pickle
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import safetensors
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from . import checkpoint, checks, hub, word_tokenizer
from .config import MoEConfig
from .extras import needed_for
from .moe import SparseMoE
from .towers import is_timm
from .upcycle import upcycle
from .weights import Weights, read_weights

open_clip.add_model_config(Path(__file__).parent / "model_configs")  # ours, known by name as open_clip's own are

LOCAL_PREFIX = "local-dir:"
_NUMPY = (".npz", ".npy")  # big_vision's weights, which open_clip reads
_POSITION_EMBEDDINGS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *, moe_cfg: MoEConfig | None = None, **kwargs: Any
) -> tuple[nn.Module, Any, Any]:
    """open_clip's function of the same name, which also loads sparse models: what ``clipup.save_pretrained`` wrote,
    from a directory or the hub, and training checkpoints.

    The model is in evaluation mode, where no token is dropped: call ``model.train()`` before training it.

    Args:
        model_name: a name that open_clip knows, a directory with an ``open_clip_config.json`` (``"DIR"`` or
            ``"local-dir:DIR"``), or ``"hf-hub:ORG/NAME"``. A bare word that open_clip knows means open_clip's model.
        pretrained: a tag or file for a model known by name: safetensors, a state dict, or a checkpoint of open_clip's
            trainer or ours. A directory brings its own weights.
        moe_cfg: the sparse layers of a sparse ``pretrained`` file that does not name them itself.
        kwargs: as in open_clip, device, precision, load_weights and force_image_size among them.

    Returns:
        model, preprocess_train, preprocess_val; a sparse model carries its ``moe_config``.

    Raises:
        ValueError: an unknown name or tag, weights that do not fit the model, or a file that holds more than weights.
        FileNotFoundError: a directory without config or weights; weights that are not on this machine, without a
            network.
        ImportError: a package that the text tower needs is not installed.
    """
    if not kwargs.get("weights_only", True):
        raise ValueError("weights_only=False would run code that a file brings; save its state dict alone instead")
    with _hub_for(model_name, pretrained, "hf_model_name", kwargs.get("cache_dir")):
        model, *transforms = _create(model_name, pretrained, moe_cfg, kwargs)
    return model.eval(), *transforms


def _create(
    model_name: str, pretrained: str | None, moe_cfg: MoEConfig | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, Any, Any]:
    load_weights = kwargs.get("load_weights", True)
    directory = model_directory(model_name) or _hub_directory(model_name, load_weights, kwargs.get("cache_dir"))
    if directory is not None:
        if pretrained:
            raise ValueError(
                f"pretrained={pretrained!r} has no meaning with the directory {directory}, which has weights"
            )
        found = checkpoint.read_moe_config(directory)
        model_name = f"{LOCAL_PREFIX}{directory}"
        weights = checkpoint.read_weights(directory) if found is not None and load_weights else None
        types = checkpoint.types_of_weights(directory) if load_weights else {}
        described_by = f"its {checkpoint.CONFIG_NAME}"
    else:
        _check_names(model_name, pretrained)
        file = _file_of_weights(model_name, pretrained)
        found = _config_of_file(file, pretrained, moe_cfg)
        weights = file.state_dict if found is not None and load_weights else None
        types = file.types if file is not None and load_weights else {}
        del file  # open_clip reads a dense one again
        described_by = f"{model_name} with its moe_cfg"
    if moe_cfg is not None and found != moe_cfg:
        raise ValueError(
            "moe_cfg has no meaning here: it says what a sparse file of weights does not say itself. To make a dense "
            "model sparse use clipup.upcycle"
        )
    if found is None:
        with _clear_errors(model_name):
            model, *transforms = open_clip.create_model_and_transforms(model_name, pretrained, **kwargs)
        checkpoint.check_types(model, types, str(pretrained or directory))
        return model, *transforms
    if kwargs.get("jit"):
        raise ValueError("jit=True is not supported for sparse models; use torch.compile")
    dense_kwargs = {**kwargs, "load_weights": False, "pretrained_image": False, "pretrained_text": False}
    with _clear_errors(model_name), expecting_random_weights():
        model, *transforms = open_clip.create_model_and_transforms(model_name, **dense_kwargs)
    upcycle(model, found, inplace=True)
    if weights is not None:
        _load(model, weights, str(pretrained or directory), described_by)
    return model, *transforms


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads weights into a model that has their architecture, dense or sparse; position embeddings are resized.

    Args:
        path: safetensors, a state dict, or a checkpoint of open_clip's trainer or ours, with or without "module."
            prefixes. Nothing in it is executed.

    Raises:
        ValueError: they do not fit, or the file holds more than weights; the model is as it was.
    """
    checks.module("model", model)
    _load(model, read_weights(path).state_dict, str(path), f"a {type(model).__name__} with these options")


def _load(model: nn.Module, weights: dict[str, Tensor], source: str, described_by: str) -> None:
    checkpoint.check_fit(model, weights, source, _POSITION_EMBEDDINGS, described_by)
    weights = dict(weights)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    checkpoint.check_fit(model, weights, source, described_by=described_by)
    model.load_state_dict(weights)


def _hub_directory(model_name: str, load_weights: bool, cache_dir: str | None) -> Path | None:
    """Where a sparse model of the hub lies on this machine; None for everything else, which open_clip loads."""
    if not model_name.startswith(hub.HUB_PREFIX):
        return None
    directory = hub.cached(model_name, checkpoint.CONFIG_NAME, cache_dir=cache_dir)
    if checkpoint.read_moe_config(directory) is None:
        return None
    files = [checkpoint.CONFIG_NAME] + [checkpoint.WEIGHTS_NAME] * load_weights
    return hub.cached(model_name, *files, cache_dir=cache_dir)


def _file_of_weights(model_name: str, pretrained: str | None) -> Weights | None:
    """The file of weights that ``pretrained`` means, None where it is none or one of numpy's.

    open_clip loads a dense one. It is read here too, so that whatever it brings beside weights is refused by name.
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
            f"{path} has sparse layers but does not say how they were made; pass moe_cfg, the MoEConfig that they were "
            "upcycled with"
        )
    return file.moe_config or given


def create_on_meta(model_name: str) -> nn.Module:
    """A model that open_clip knows, or a directory's, on the meta device: shapes without weights, in no memory."""
    with torch.device("meta"), expecting_random_weights():
        return create_model_and_transforms(model_name, device="meta", load_weights=False, pretrained_text=False)[0]


def get_tokenizer(model_name: str, **kwargs: Any) -> Any:
    """open_clip's function of the same name, which also takes a bare directory.

    A Hugging Face tokenizer is read from the directory where it was saved there, else by the name in the config; the
    vocabulary of a ``clipup.word_tokenizer`` likewise.
    """
    with _hub_for(model_name, None, "hf_tokenizer_name", kwargs.get("cache_dir")):
        return _tokenizer(model_name, **kwargs)


def _tokenizer(model_name: str, **kwargs: Any) -> Any:
    directory = model_directory(model_name)
    if model_name.startswith(hub.HUB_PREFIX):
        return _hub_tokenizer(model_name, **kwargs)
    text_cfg = get_model_config(model_name).get("text_cfg", {})
    _refuse_code(text_cfg, model_name)
    if word_tokenizer.is_asked_for(text_cfg):
        return word_tokenizer.of_config(text_cfg, directory, **kwargs)
    if directory is None:
        return open_clip.get_tokenizer(model_name, **kwargs)
    hub_name = text_cfg.get("hf_tokenizer_name")
    if hub_name and not (directory / "tokenizer_config.json").is_file():
        options = {**text_cfg.get("tokenizer_kwargs", {}), **kwargs}
        options.setdefault("context_length", text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
        return open_clip.tokenizer.HFTokenizer(hub_name, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    return open_clip.get_tokenizer(f"{LOCAL_PREFIX}{directory}", **kwargs)


def _hub_tokenizer(model_name: str, cache_dir: str | None = None, **kwargs: Any) -> Any:
    try:
        found = hub.cached(model_name, checkpoint.CONFIG_NAME, cache_dir=cache_dir)
        text_cfg = checkpoint.read_config(found)["model_cfg"].get("text_cfg", {})
    except FileNotFoundError:  # no model of open_clip's: a tokenizer by itself, or nothing, as open_clip will say
        text_cfg = {}
    _refuse_code(text_cfg, model_name)
    if word_tokenizer.is_asked_for(text_cfg):
        found = hub.cached(model_name, checkpoint.CONFIG_NAME, word_tokenizer.FILE_NAME, cache_dir=cache_dir)
        return word_tokenizer.of_config(text_cfg, found, **kwargs)
    return open_clip.get_tokenizer(model_name, cache_dir=cache_dir, **kwargs)


def _refuse_code(text_cfg: dict[str, Any], source: str) -> None:
    """A config's ``tokenizer_kwargs`` reach transformers, which runs a model's own code when they say so."""
    if (text_cfg.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise ValueError(
            f"tokenizer_kwargs: the config of {source} sets trust_remote_code, which would run code that comes with "
            "it; nothing of it was run. Remove that from the config, or load the tokenizer with transformers, if you "
            "trust it"
        )


def get_model_config(model_name: str) -> dict[str, Any]:
    """The ``model_cfg`` of a name that open_clip knows, or of a directory; a copy."""
    directory = model_directory(model_name)
    if directory is not None:
        return checkpoint.read_config(directory)["model_cfg"]
    _check_names(model_name, None)
    return open_clip.get_model_config(model_name)


def model_directory(model_name: str) -> Path | None:
    """The directory that a model name means, None when it is a name for open_clip."""
    if not isinstance(model_name, str):
        raise TypeError(f"model_name must be a str, also where it is a directory, got {type(model_name).__name__}")
    if model_name.startswith(LOCAL_PREFIX):
        return Path(model_name.removeprefix(LOCAL_PREFIX))
    if model_name in open_clip.list_models() or model_name.startswith(hub.HUB_PREFIX):
        return None
    return Path(model_name) if Path(model_name).is_dir() else None


@contextmanager
def _hub_for(model_name: str, pretrained: str | None, text_field: str, cache_dir: str | None) -> Iterator[None]:
    """Around whatever may download parts of a model.

    Args:
        text_field: of the text tower's config, which names what Hugging Face has of it.
    """
    directory = model_directory(model_name)
    on_hub = model_name.startswith(hub.HUB_PREFIX)
    config = None if on_hub or directory is not None else open_clip.get_model_config(model_name)
    if directory is not None:
        config = checkpoint.read_config(directory)["model_cfg"]
    text_cfg = (config or {}).get("text_cfg", {})
    hf_name = None if word_tokenizer.is_asked_for(text_cfg) else text_cfg.get(text_field)
    if hf_name:
        with needed_for(f"the text tower of {model_name}", "hf"):
            import transformers  # noqa: F401
    is_tag = pretrained is not None and open_clip.get_pretrained_cfg(model_name, pretrained) != {}
    if not (on_hub or is_tag or hf_name):
        yield
        return
    what = f"pretrained={pretrained!r} of {model_name}" if is_tag else model_name
    with hub.cache_alone_if_unreachable(what, cache_dir):
        yield


def _check_names(model_name: str, pretrained: str | None) -> None:
    if model_name.startswith(hub.HUB_PREFIX):
        return
    if model_name.replace("/", "-") not in open_clip.list_models():
        close = difflib.get_close_matches(model_name, open_clip.list_models(), n=3)
        hint = f"; similar names are {', '.join(close)}" if close else ""
        raise ValueError(f"{model_name!r} is neither a model that open_clip knows nor a directory{hint}")
    if pretrained and open_clip.get_pretrained_cfg(model_name, pretrained) == {} and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise ValueError(f"pretrained={pretrained!r} is neither a file nor a tag of {model_name}; its tags are {tags}")


@contextmanager
def _clear_errors(model_name: str) -> Iterator[None]:
    """Turns what open_clip raises about names, files and downloads (RuntimeError, AssertionError about widths,
    SafetensorError, and UnpicklingError about files that bring code) into a ValueError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights of {model_name} hold more than tensors and plain values, which only running their code could "
            "load; nothing of it was run. Get them as safetensors"
        ) from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights of {model_name} cannot be read, the file is broken: {error}") from error
    except (RuntimeError, AssertionError) as error:
        lines = [textwrap.shorten(line, 200, placeholder=" ...") for line in str(error).splitlines() if line.strip()]
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        misfit = isinstance(error, AssertionError) or "state_dict" in str(error)
        hint = "; the weights are of another model or config" if misfit else ""
        raise ValueError(f"open_clip could not create {model_name}: {' '.join(lines[:4])}{more}{hint}") from error


def expecting_random_weights() -> AbstractContextManager[None]:
    """Silences open_clip's warning that a model has random weights, where that is intended."""
    return hub.without_log_lines("No pretrained weights loaded")


class _Projection(NamedTuple):
    weight: Tensor


class BlockMoE(SparseMoE):
    """SparseMoE in a block of open_clip's own, which reads the tower's type from ``block.mlp.c_fc.weight.dtype``."""

    @property
    def c_fc(self) -> _Projection:
        return _Projection(self.in_weight)


def sparse_layer_class(block: nn.Module) -> type[SparseMoE]:
    """The class that takes the place of the MLP in a block."""
    return BlockMoE if hasattr(block, "get_weight_dtype") else SparseMoE


def encoders(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """What turns images into features [B, ...], called "image", and for texts, where there is a tower, "text"."""
    return {"image": model} if is_timm(model) else {"image": model.encode_image, "text": model.encode_text}


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels that the image tower takes."""
    if is_timm(model):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return tuple(size or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[1:])
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def image_dtype(model: nn.Module) -> torch.dtype:
    """The type that the image tower takes: that of its first convolution, else of its first parameter."""
    tower = getattr(model, "visual", model)
    convolutions = (module.weight for module in tower.modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, next(tower.parameters())).dtype


def text_length(model: nn.Module) -> int:
    """Tokens in a text of full length; for Hugging Face towers, which may set no bound, what open_clip's tokenizers cut
    a text to."""
    if isinstance(getattr(model, "text", None), HFTextEncoder):
        return open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
    return model.context_length


def vocabulary_size(model: nn.Module) -> int:
    """Token ids that the text tower knows."""
    return getattr(model, "text", model).vocab_size


def image_normalization(model: nn.Module) -> tuple[tuple[float, ...], ...] | None:
    """Mean and standard deviation by which images are normalised; None where open_clip has not noted them."""
    noted = [getattr(getattr(model, "visual", None), name, None) for name in ("image_mean", "image_std")]
    return None if None in noted else tuple(map(tuple, noted))


def ignore_padding(model: nn.Module) -> None:
    """Keeps the mask of padding from a Hugging Face text tower, which looks into it: on the meta device it cannot."""
    text = getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        text.transformer.register_forward_pre_hook(
            lambda tower, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )


def random_inputs(model: nn.Module, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Noise images [B, 3, height, width] and texts [B, length] of random tokens, each with an end-of-text token at a
    random place and padding behind it; None for texts where the model takes none. On the CPU, the same for the same
    seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, *image_size(model), generator=generator).to(image_dtype(model))
    if "text" not in encoders(model):
        return images, None
    text = getattr(model, "text", model)
    pool_type = getattr(text, "pool_type", getattr(model, "text_pool_type", "argmax"))
    eos_id = getattr(text, "eos_id", getattr(model, "text_eos_id", None))
    length, vocabulary = text_length(model), vocabulary_size(model)
    padding = text.config.pad_token_id if isinstance(text, HFTextEncoder) else 0
    end_of_text = eos_id if pool_type == "eos" else vocabulary - 1
    texts = torch.randint(max(1, vocabulary // 2), vocabulary - 1, (batch_size, length), generator=generator)
    texts = texts.where(texts != end_of_text, 1)
    ends = torch.randint(min(2, length - 1), length, (batch_size, 1), generator=generator)
    positions = torch.arange(length)
    texts = torch.where(positions < ends, texts, torch.where(positions == ends, end_of_text, padding))
    return images, texts
