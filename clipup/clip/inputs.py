"""The inputs of a model: encoders, image size and dtype, text length, vocabulary size, and random inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from .towers import is_timm


def encoders(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The functions that compute features [B, ...]: "image", and "text" if the model has a text tower."""
    clip: Any = model  # nn.Module types what it does not know as Tensor | Module
    return {"image": model} if is_timm(model) else {"image": clip.encode_image, "text": clip.encode_text}


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the image tower's input."""
    size: Any
    if is_timm(model):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = size or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[1:]
    else:
        size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def image_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the image tower's input: that of its first convolution, otherwise of its first parameter."""
    tower = getattr(model, "visual", model)
    convolutions = (module.weight for module in tower.modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, next(tower.parameters())).dtype


def image_channels(model: nn.Module) -> int:
    """Channels of the image tower's input: those that a timm model's ``patch_embed`` reads, otherwise 3."""
    patches = getattr(model, "patch_embed", nn.Identity())
    return next((module.in_channels for module in patches.modules() if isinstance(module, nn.Conv2d)), 3)


def text_length(model: nn.Module) -> int:
    """Tokens per text of full length. For Hugging Face towers, which may have no limit, it is the length to which
    open_clip's tokenizers truncate."""
    if isinstance(getattr(model, "text", None), HFTextEncoder):
        return open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
    clip: Any = model
    return clip.context_length


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids of the text tower."""
    text: Any = getattr(model, "text", model)
    return text.vocab_size


class CheckedTokenizer:
    """A tokenizer that raises ValueError for token ids that the model's token embedding does not have.

    It keeps the size of the embedding and not the model, so that it can be sent to data workers.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor], model: nn.Module) -> None:
        text: Any = getattr(model, "text", model)
        embedding = (
            text.transformer.get_input_embeddings()
            if isinstance(text, HFTextEncoder)
            else getattr(text, "token_embedding", None)
        )
        self.tokenizer = tokenizer
        self.shape = None if embedding is None else tuple(embedding.weight.shape)

    def __call__(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts)
        if self.shape is not None and tokens.numel() and tokens.max() >= self.shape[0]:
            raise ValueError(
                f"the tokenizer gives token id {int(tokens.max())}, but the model's token embedding {list(self.shape)} "
                f"has ids up to {self.shape[0] - 1}: they do not belong together. Use the tokenizer that the model was "
                "trained with (hf_tokenizer_name in the text_cfg of its config), or weights with the whole vocabulary"
            )
        return tokens

    def check(self) -> CheckedTokenizer:
        """Tries a text at once: in many vocabularies the end-of-text token has the largest id."""
        self(["a photo"])
        return self


def image_normalization(model: nn.Module) -> tuple[tuple[float, ...], ...] | None:
    """Mean and standard deviation that images are normalised with; None if open_clip did not record them."""
    mean, std = (getattr(getattr(model, "visual", None), name, None) for name in ("image_mean", "image_std"))
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def ignore_padding(model: nn.Module) -> None:
    """Removes the padding mask of a Hugging Face text tower, which reads its values: meta tensors have none."""
    text = getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        text.transformer.register_forward_pre_hook(
            lambda tower, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )


def random_inputs(model: nn.Module, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Random images [B, C, height, width] and texts [B, length] on the CPU, deterministic for a seed.

    Each text has an end-of-text token at a random position, followed by padding. Texts are None for a model without a
    text tower.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = batch_size, image_channels(model), *image_size(model)
    images = torch.randn(shape, generator=generator).to(image_dtype(model))
    if "text" not in encoders(model):
        return images, None
    text = getattr(model, "text", model)
    pool_type = getattr(text, "pool_type", getattr(model, "text_pool_type", "argmax"))
    eos_id: Any = getattr(text, "eos_id", getattr(model, "text_eos_id", None))
    length, vocabulary = text_length(model), vocabulary_size(model)
    padding: int = text.config.pad_token_id if isinstance(text, HFTextEncoder) else 0
    end_of_text: int = eos_id if pool_type == "eos" else vocabulary - 1
    texts = torch.randint(max(1, vocabulary // 2), vocabulary - 1, (batch_size, length), generator=generator)
    texts = texts.where(texts != end_of_text, 1)
    ends = torch.randint(min(2, length - 1), length, (batch_size, 1), generator=generator)
    positions = torch.arange(length)
    texts = torch.where(positions < ends, texts, torch.where(positions == ends, end_of_text, padding))
    return images, texts
