"""The activations of a plan are what autograd saves in a real forward pass."""

import pytest
import tiny_parallel
import torch
from measured_steps import saved_in_forward
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipup.plan.activations import activations, bytes_per_logit, saved_bytes
from clipup.precision import autocast
from clipup.train.chunked_losses import ChunkedClipLoss, ChunkedSigLipLoss

MOE = {"dense": None, "sparse": {"padding_aware": False, "capacity_factor": None}}


def model(kind, precision):
    made = tiny_parallel.model(MOE[kind]).train()
    return made.bfloat16() if precision == "bf16" else made


def batch(pairs, precision):
    images = torch.randn(pairs, 3, 16, 16, dtype=torch.bfloat16 if precision == "bf16" else None)
    return images, torch.randint(1, 64, (pairs, 8))


def really_saved(clip, precision, pairs, checkpointed):
    clip.set_grad_checkpointing(checkpointed)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), autocast(precision, torch.device("cpu")):
        return saved_in_forward(clip, batch(pairs, precision))


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp_bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forward_pass_saves_the_counted_bytes(kind, precision, checkpointed):
    clip = model(kind, precision)
    counted = saved_bytes(clip, precision, "cpu", 6, checkpointed)
    assert counted == pytest.approx(really_saved(clip, precision, 6, checkpointed), rel=0.02)


@pytest.mark.parametrize("kind", MOE)
def test_activations_of_a_batch_follow_from_those_of_a_pair(kind):
    clip = model(kind, "fp32")
    found = activations(clip, "fp32", "cpu")
    for checkpointed, per_pair in ((False, found.per_pair), (True, found.checkpointed_per_pair)):
        counted = saved_bytes(clip, "fp32", "cpu", 40, checkpointed)
        assert found.fixed + 40 * per_pair == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("loss", "scales"), [(ChunkedClipLoss, 1), (ChunkedSigLipLoss, 2)])
def test_the_loss_saves_the_counted_bytes_for_each_logit(loss, scales):
    pairs, saved = 128, {}
    inputs = [torch.randn(pairs, 8, requires_grad=True) for _ in range(2)]
    inputs += [torch.ones((), requires_grad=True) for _ in range(scales)]

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()(*inputs)
    expected = bytes_per_logit(loss is ChunkedSigLipLoss, "fp32") * pairs**2
    logits = 4 * pairs**2
    assert sum(size for size in (one.nbytes() for one in saved.values()) if size >= logits) == expected


def test_the_modes_of_the_caller_change_nothing():
    clip = model("sparse", "amp_bf16")
    expected = activations(clip, "amp_bf16"), bytes_per_logit(False, "amp_bf16")
    plain = saved_bytes(clip, "fp32", "cuda", 6, False)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with mode:
            assert (activations(clip, "amp_bf16"), bytes_per_logit(False, "amp_bf16")) == expected
            assert saved_bytes(clip, "fp32", "cuda", 6, False) == plain
    torch.set_default_dtype(torch.float64)
    try:
        assert (activations(clip, "amp_bf16"), bytes_per_logit(False, "amp_bf16")) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_of_experts_are_those_of_the_shared_one_too():
    found = [
        activations(tiny_parallel.model({**MOE["sparse"], "shared_expert": shared}), "amp_bf16")
        for shared in (False, True)
    ]
    one = tiny_parallel.model(None).transformer.resblocks[0].mlp
    shared = 2 * sum(parameter.numel() for parameter in one.parameters())
    assert found[1].largest_expert_copies - found[0].largest_expert_copies == shared
    assert found[1].expert_copies - found[0].expert_copies == 2 * shared
