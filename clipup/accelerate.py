"""Dense MLPs on the kernels of the experts, for inference on CPUs: what stays dense in a sparse model gains too."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from clipup_kernels import dense_mlp

from .mlp_families import families_read, find_mlp, read_mlp, replace_mlp


class AcceleratedMLP(nn.Module):
    """A dense MLP that runs on ``clipup_kernels.dense_mlp`` on the CPU, outside of autograd and autocast.

    Elsewhere it runs as it did. Children and names of parameters are the MLP's own, so that state dicts fit both ways.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        read_mlp(mlp)
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self._original = [mlp]  # in a list: registered once, through its children

    def forward(self, x: Tensor) -> Tensor:
        (mlp,) = self._original
        dense = read_mlp(mlp)
        differentiated = torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for t in dense.parameters().values())
        )
        casts = torch.is_autocast_enabled("cpu") or x.dtype != dense.in_weight.dtype
        drops = self.training and dense.dropout > 0
        if x.device.type != "cpu" or differentiated or casts or drops:
            return mlp(x)
        if dense.input_norm is not None:
            x = dense.input_norm(x)
        y = dense_mlp(
            x.reshape(-1, x.shape[-1]), dense.in_weight, dense.in_bias, dense.out_weight, dense.out_bias,
            dense.activation, dense.gate_weight, dense.gate_bias,
        )  # fmt: skip
        return y.view(x.shape)


def accelerate(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Runs the dense MLP blocks of a transformer on this project's CPU kernels in inference.

    The features are the same to rounding, parameters and state dict stay as they are, and training, autocast and other
    devices run as before, but for one thing: on a CPU a text tower that returns nothing but its end-of-text token's
    features stops at the end of the batch's longest text, as upcycled ones do (``clipup.padding_aware``). Packed copies
    of the weights are kept between calls (``clipup_kernels.pack_weights``). Upcycle first: what was accelerated is not
    read as an MLP again.

    Args:
        model: any module with transformer blocks of a family that ``clipup.mlp_families`` reads, sparse or dense. MLPs
            that are spread over several modules (BERT's) or have a norm between their projections run as before.
        inplace: change ``model`` itself instead of a copy.

    Raises:
        ValueError: the model has no such block.
    """
    from .padding_aware import leave_padding_out  # brings open_clip, which SparseMoE does without

    if not inplace:
        model = copy.deepcopy(model)
    blocks = [module for module in model.modules() if _can_run(module)]
    if not blocks:
        raise ValueError(f"the model has no dense MLP to accelerate; {families_read()}")
    for block in blocks:
        replace_mlp(block, AcceleratedMLP(find_mlp(block).module))
    leave_padding_out(model)
    return model


def _can_run(block: nn.Module) -> bool:
    """Whether a block's MLP is one module that ``dense_mlp`` computes."""
    try:
        found = find_mlp(block)
    except TypeError:
        return False
    return len(found.family.parts) == 1 and found.dense.ln_weight is None
