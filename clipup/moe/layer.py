"""``SparseMoE``: a Mixture-of-Experts MLP in place of a dense one. It holds parameters and options and calls ops.

Axis legend, used in every shape: ``T`` tokens, ``D`` model width, ``H`` hidden width, ``E`` experts, ``K`` choices a
token, ``R = T*K`` rows (one a (token, choice) pair). Weights lie as in ``nn.Linear``: ``[E, out, in]``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checks
from ..dense.dense_mlp import DenseMLP
from ..dense.mlp_families import read_mlp
from ..precision import autocast_dtype
from .config import BalanceForm, GateNormalization, MoEConfig, Score, SelectionBias, check_config
from .expert_init import experts_of, redraw_hidden_units
from .experts import Experts, SharedExpert
from .layer_state import Records, recomputing
from .router import Router, Routing, weighted_losses

SHARED_GATE = 0.5
"""The shared expert's part of the output. DeepSeekMoE adds shared and routed experts up; an average of them makes an
upcycled layer, in which both are the dense MLP, start as that MLP."""


class SparseMoE(Experts):
    """``y = sum_k gate_k * expert_k(x)`` over the K experts that a router picks for every token.

    Parameters: ``router.weight`` [E, D], ``in_weight`` [E, H, D], ``in_bias`` [E, H], ``out_weight`` [E, D, H],
    ``out_bias`` [E, D]; gated experts also ``gate_weight`` [E, H, D], ``gate_bias`` [E, H]; with a norm ``ln_weight``
    and ``ln_bias`` [E, H] ("ln" in a name tells open_clip's optimizer what does not decay). ``bias=False``: projections
    without biases. A shared expert's have the same names under ``shared.``, [1, ...]. A selection bias is the buffer
    ``router.selection_bias`` [E].

    With a ``granularity`` G the experts are parts of MLPs, and y is G times that sum (a whole MLP is the sum of G
    parts). With a ``shared_expert``, ``y = (shared(x) + sum_k gate_k * expert_k(x)) / 2``.

    Types: x and the experts' weights must be of one floating type, as in ``nn.Linear``; inside autocast both are cast
    to its type. y is of that type. The router, the gates and the losses are float32 in any case.

    Losses: a forward in training mode with gradients enabled leaves its weighted losses in the layer until ``aux_loss``
    takes them. Each forward is counted once; activation checkpointing's second forward is not counted. A loss that
    nobody took is dropped when a backward pass has gone through y. Losses, and what ``moe_metrics`` shows, belong to
    the thread that ran the forward. Reentrant checkpointing runs its first forward without gradients and therefore
    leaves no losses: use ``use_reentrant=False``. Under ``torch.compile`` a layer holds the losses of its last forward
    only. Inside a transform of ``torch.func`` losses must be taken inside it too; routing and load are not recorded.

    Args:
        d_model: D. d_hidden: H, of every expert; a shared expert has granularity * d_hidden.
        activation: one of ``clipup_kernels.ACTIVATIONS``.
        bias: whether both projections have biases.
        gated: experts compute ``act(W_gate x + b_gate) * (W_in x + b_in)`` before the output projection.
        device, dtype: of all parameters.
        norm: "layer" gives every expert a layer norm of its own between its projections.
        norm_eps: what the norm adds to the variance.
        dropout: probability with which an entry between the projections is dropped in training, before the norm. With a
            norm, and with a dropout in training, experts run on the unfused ops.

    The other options are those of ``MoEConfig``, where each is explained. ``layer.config`` holds them; assigning
    another config (``layer.config = layer.config.replace(capacity_factor=1.25)``) takes effect at the next forward.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int = 8,
        top_k: int = 2,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        activation: str = "gelu",
        bias: bool = True,
        gated: bool = False,
        normalize_gates: GateNormalization = "before_drop",
        priority: bool = False,
        router_noise: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Literal["layer"] | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        granularity: int = 1,
        shared_expert: bool = False,
        score: Score = "softmax",
        selection_bias: SelectionBias = "none",
        selection_bias_rate: float = 1e-3,
        balance_weight: float = 0.0,
        balance: BalanceForm = "topk",
        z_weight: float = 0.0,
        importance_weight: float = 0.0,
        load_weight: float = 0.0,
        local_entropy_weight: float = 0.0,
        global_entropy_weight: float = 0.0,
        entropy_threshold: float | None = None,
    ) -> None:
        mlp: dict[str, Any] = {"activation": activation, "bias": bias, "gated": gated, "norm": norm}
        mlp |= {"norm_eps": norm_eps, "dropout": dropout, "device": device, "dtype": dtype}
        config = MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            granularity=granularity,
            shared_expert=shared_expert,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            normalize_gates=normalize_gates,
            priority=priority,
            router_noise=router_noise,
            score=score,
            selection_bias=selection_bias,
            selection_bias_rate=selection_bias_rate,
            balance_weight=balance_weight,
            balance=balance,
            z_weight=z_weight,
            importance_weight=importance_weight,
            load_weight=load_weight,
            local_entropy_weight=local_entropy_weight,
            global_entropy_weight=global_entropy_weight,
            entropy_threshold=entropy_threshold,
        )
        super().__init__(d_model, d_hidden, num_experts, **mlp)
        self.router = Router(d_model, config, device=device, dtype=dtype)
        self.shared = SharedExpert(d_model, granularity * d_hidden, 1, **mlp) if shared_expert else None
        self.records = Records()

    @classmethod
    def from_dense(cls, mlp: nn.Module, config: MoEConfig | None = None) -> SparseMoE:
        """E copies of a dense MLP behind a fresh router, on the MLP's device and of its type.

        Every parameter can be trained as the one it is copied from could; the router can when any of them could.
        With gates that are normalised (``normalize_gates`` not "none"), no hidden units drawn anew (``reinit_ratio``),
        nothing dropped and, where there are shards, no router noise, the layer computes what the MLP did:

        - with a shared expert, because that and the normalised sum of the others are the MLP, half of each;
        - with a granularity, because the router's rows are drawn once for every virtual group of shards, so that
          whole groups are chosen, each shard with the same gate.

        Raises:
            TypeError: the MLP is of no family that ``clipup.dense.mlp_families`` reads, or has a norm in front of its
                projections, which is no part of an expert (``upcycle`` leaves it in front of the layer).
            TypeError, ValueError: the MLP does not split into ``config.granularity`` shards.
        """
        dense = mlp if isinstance(mlp, DenseMLP) else read_mlp(mlp)
        if dense.input_norm is not None:
            raise TypeError(
                "the MLP has a norm in front of its projections, which is no part of an expert; use clipup.upcycle, or "
                "read the MLP with clipup.dense.mlp_families.read_mlp and put its input_norm in front of the layer"
            )
        config = config if config is not None else MoEConfig()
        check_config("config", config)
        d_hidden, d_model = dense.in_weight.shape
        experts = experts_of(dense, config.num_experts, config.granularity)
        if config.reinit_ratio > 0:
            redraw_hidden_units(experts, config.reinit_ratio)
        layer = cls(
            d_model,
            d_hidden // config.granularity,
            activation=dense.activation,
            bias=dense.in_bias is not None,
            gated=dense.gate_weight is not None,
            device="meta",
            dtype=dense.in_weight.dtype,
            norm=None if dense.ln_weight is None else "layer",
            norm_eps=dense.ln_eps,
            dropout=dense.dropout,
            **config.layer_options(),
        )
        layer.config = config
        trained = {name: source.requires_grad for name, source in dense.parameters().items()}
        layer.set_experts(experts, trained)
        if layer.shared is not None:
            layer.shared.set_experts(experts_of(dense, num_experts=1), trained)
        layer.router.to_empty(device=dense.in_weight.device).requires_grad_(any(trained.values()))
        layer.router.reset_to_virtual_groups()
        layer.train(mlp.training if isinstance(mlp, nn.Module) else True)
        return layer

    @property
    def config(self) -> MoEConfig:
        return self.router.config

    @config.setter
    def config(self, config: MoEConfig) -> None:
        self.router.config = config

    def reset_parameters(self) -> None:
        """Draws every expert as ``nn.Linear`` would draw it, independently, and a fresh router."""
        self.router.reset_parameters()
        self.reset_experts()
        if self.shared is not None:
            self.shared.reset_experts()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [..., D].
            mask: bool, x's leading dimensions; True takes part. Elsewhere y is 0, and the token counts neither for
                capacity nor for losses.

        Returns:
            y: [..., D] of x's type, or autocast's.
        """
        self._check(x, mask)
        tokens = x.reshape(-1, self.d_model).contiguous()  # the router rounds a strided view differently
        token_mask = None if mask is None else mask.reshape(-1)
        dtype = autocast_dtype(x)
        with nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False):
            routing = self.router(tokens, token_mask)
            y = self._mixture(tokens, routing, dtype)
            learns = self.training and torch.is_grad_enabled()
            loss = weighted_losses(routing, self.config) if learns and self.config.has_losses else None
        if not (recomputing() or torch.compiler.is_exporting()):
            self.records.keep(routing, y, loss, counts_load=learns and self.config.selection_bias != "none")
        return y.view(x.shape)

    def _mixture(self, tokens: Tensor, routing: Routing, dtype: torch.dtype | None) -> Tensor:
        """[T, D]. Gates that sum to 1 over parts of MLPs add up to 1/granularity of an MLP. NVIDIA (arXiv 2410.07524)
        scales the weights to make up for it; here the gates are scaled, and the experts' projections stay the dense
        MLP's to the bit."""
        routed = 1 if self.shared is None else 1 - SHARED_GATE
        scale = self.config.granularity * routed
        y = self.run_experts(tokens, routing.gates if scale == 1 else scale * routing.gates, routing.plan, dtype)
        return y if self.shared is None else y + self.shared(tokens, routing.mask, dtype, SHARED_GATE)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        checks.tensor("x", x)
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [..., {self.d_model}], the layer's d_model last, got {list(x.shape)}")
        if x.dtype != self.in_weight.dtype and autocast_dtype(x) is None:
            raise TypeError(
                f"x is {x.dtype} but the experts' weights are {self.in_weight.dtype}; cast one of them, or use "
                "torch.autocast, where the layer casts both"
            )
        if mask is None:
            return
        checks.tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool, True for tokens that take part, got {mask.dtype}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must have x's leading dimensions {list(x.shape[:-1])}, got {list(mask.shape)}")

    def extra_repr(self) -> str:
        config = self.config
        parts = [f"{self.d_model}, {self.d_hidden}", f"num_experts={config.num_experts}", f"top_k={config.top_k}"]
        parts += [f"activation={self.activation!r}", f"capacity_factor={config.capacity_factor}"]
        parts += [f"granularity={config.granularity}"] if config.granularity > 1 else []
        parts += [f"score={config.score!r}"] if config.score != "softmax" else []
        parts += ["bias=False"] if self.in_bias is None else []
        parts += ["gated=True"] if self.gate_weight is not None else []
        parts += ["norm='layer'"] if self.ln_weight is not None else []
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(parts)


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """The sparse layers of a model by name, in the order in which its modules are registered.

    Raises:
        TypeError: ``model`` is no module.
    """
    checks.module("model", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}


def aux_loss(model: nn.Module) -> Tensor:
    """Takes the weighted auxiliary losses of the calling thread's forwards, and returns their sum.

    Add it to the loss of every forward, or of several forwards at once: each forward's losses are counted once. A 0-d
    float32 tensor, 0 when there is nothing to take (evaluation, no weights, no sparse layers).

    A forward's losses belong to the thread that ran it, so several threads can train or evaluate one model. Where other
    threads run the forwards of a step (``nn.DataParallel``), call ``aux_loss`` there too, inside the wrapped module,
    and return its value with the output.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: there is nothing to take, but losses of a thread that has ended are left; or of any other thread
            where the calling one has not run the model itself.
    """
    layers = moe_layers(model)
    taken = [loss for layer in layers.values() for loss in layer.records.take_losses()]
    if taken:
        return torch.stack([loss.to(taken[0].device) for loss in taken]).sum()
    if not torch.compiler.is_compiling():
        _refuse_losses_of_other_threads(layers)
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def _refuse_losses_of_other_threads(layers: dict[str, SparseMoE]) -> None:
    for name, layer in layers.items():
        count = layer.records.untaken_elsewhere()
        if count:
            raise RuntimeError(
                f"aux_loss found no losses of this thread, but {count} that forwards of {name or 'the layer'} left in "
                "other threads. A forward's losses belong to the thread that ran it: call aux_loss there, with "
                "nn.DataParallel inside the wrapped module, and return its value with the output"
            )
