"""The contrastive losses in chunks: open_clip's values and gradients, without all logits in memory."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.utils._python_dispatch import TorchDispatchMode

from clipup.train.chunked_losses import ChunkedClipLoss, ChunkedSigLipLoss, MultiPositiveClipLoss

PAIRS = 11


def inputs():
    torch.manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(PAIRS, 6, dtype=torch.float64), dim=-1) for _ in range(2)]
    scales = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (*features, *scales)]


LOSSES = {"softmax": (ChunkedClipLoss, ClipLoss), "sigmoid": (ChunkedSigLipLoss, SigLipLoss)}


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 11, 50, None])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_chunked_loss_is_open_clips(kind, chunk_size):
    chunked, whole = LOSSES[kind]
    values = [loss(*inputs()) for loss in (chunked(chunk_size), whole())]
    torch.testing.assert_close(*values)
    gradients = []
    for loss in (chunked(chunk_size), whole()):
        arguments = inputs()
        gradients.append(torch.autograd.grad(loss(*arguments), arguments))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_equal_captions_are_left_out_in_every_chunk(chunk_size):
    images, texts, scale, _ = inputs()
    captions = torch.arange(PAIRS)[:, None] % 4

    whole = MultiPositiveClipLoss()(images, texts, scale, captions)
    torch.testing.assert_close(MultiPositiveClipLoss(chunk_size)(images, texts, scale, captions), whole)
    assert whole < ClipLoss()(images, texts, scale)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("kind", LOSSES)
def test_no_tensor_has_more_logits_than_a_chunk(kind):
    torch.manual_seed(0)
    features = [torch.randn(128, 4, requires_grad=True) for _ in range(2)]
    scale, bias = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    with LargestTensor() as tensors:
        LOSSES[kind][0](chunk_size=8)(*features, scale, bias).backward()
    assert tensors.largest == 8 * 128
