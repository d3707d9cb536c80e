"""The activations of a plan are what autograd saves in a real forward pass."""

import pytest
import tiny_parallel
import torch
from measured_steps import saved_in_forward
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipup.plan.activations import ForwardPass, activations
from clipup.precision import autocast
from clipup.train.objectives.contrastive import ContrastiveObjective
from clipup.train.objectives.sigmoid import SigmoidObjective

MOE = {"dense": None, "sparse": {"padding_aware": False, "capacity_factor": None}}


def model(kind, precision):
    made = tiny_parallel.model(MOE[kind]).train()
    return made.bfloat16() if precision == "bf16" else made


@pytest.mark.parametrize(
    ("kind", "precision", "checkpointed"),
    [
        ("dense", "fp32", False),
        ("dense", "amp_bf16", True),
        ("sparse", "bf16", False),
        ("sparse", "amp_bf16", False),
        ("sparse", "fp32", True),
    ],
)
def test_a_forward_pass_saves_the_counted_bytes(kind, precision, checkpointed):
    clip = model(kind, precision)
    clip.set_grad_checkpointing(checkpointed)
    images = torch.randn(40, 3, 16, 16, dtype=torch.bfloat16 if precision == "bf16" else None)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), autocast(precision, torch.device("cpu")):
        real = saved_in_forward(clip, (images, torch.randint(1, 64, (40, 8))))
    assert ForwardPass(clip, precision, "cpu", 40, checkpointed).saved == pytest.approx(real, rel=0.02)
    found = activations(clip, precision, "cpu")
    per_pair = found.checkpointed_per_pair if checkpointed else found.per_pair
    if not (checkpointed and precision == "amp_bf16"):  # which keeps fewer copies of weights than are made
        assert found.fixed + 40 * per_pair == pytest.approx(real, rel=0.02)
    assert 0 < found.largest_block_per_pair < found.per_pair


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize(("objective", "scales"), [(ContrastiveObjective, 1), (SigmoidObjective, 2)])
def test_the_loss_saves_the_counted_bytes_for_each_logit(objective, scales, precision):
    pairs, saved = 128, {}
    inputs = [torch.randn(pairs, 8, requires_grad=True) for _ in range(2)]
    inputs += [torch.ones((), requires_grad=True) for _ in range(scales)]

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        autocast(precision, torch.device("cpu")),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        objective().loss(*inputs)
    large = sum(size for size in (one.nbytes() for one in saved.values()) if size >= pairs**2)
    assert large == objective.bytes_per_logit(precision) * pairs**2


def test_copies_of_experts_are_those_of_the_shared_one_too():
    alone, beside_shared = (
        activations(tiny_parallel.model({**MOE["sparse"], "shared_expert": shared}), "amp_bf16").expert_copies
        for shared in (False, True)
    )
    mlp = tiny_parallel.model(None).transformer.resblocks[0].mlp
    shared = 2 * sum(parameter.numel() for parameter in mlp.parameters())
    assert [b - a for a, b in zip(alone, beside_shared, strict=True)] == [shared, shared]
