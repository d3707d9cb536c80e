"""What a model takes: image sizes, text lengths, and random inputs to try it with."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from .towers import is_timm


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
