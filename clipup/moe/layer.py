"""``SparseMoE``: a Mixture-of-Experts MLP that replaces a dense one. It holds parameters and options and calls ops.

Axis legend, used in every shape: ``T`` tokens, ``D`` model width, ``H`` hidden width, ``E`` experts, ``K`` choices per
token, ``R = T*K`` rows (one per (token, choice) pair). Weights are laid out as in ``nn.Linear``: ``[E, out, in]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import checks
from ..dense.dense_mlp import DenseMLP, FirstLinear
from ..dense.expert_init import experts_of
from ..dense.mlp_families import read_mlp
from ..precision import autocast_dtype
from .config import CREATION_FIELDS, LayerOptions, MoEConfig, layer_config
from .experts import Experts, SharedExpert
from .layer_state import LayerState, recomputing, warn_inside_function
from .router import Router, Routing, TokenRouting, weighted_losses
from .step_counts import StepCounts, over_ranks

SHARED_GATE = 0.5
"""The shared expert's share of the output. DeepSeekMoE adds shared and routed experts; averaging them makes an upcycled
layer, in which both equal the dense MLP, start as that MLP."""


class SparseMoE(Experts):
    """``y = sum_k gate_k * expert_k(x)`` over the K experts that the router selects for each token.

    Parameters: ``router.weight`` [E, D], ``in_weight`` [E, H, D], ``in_bias`` [E, H], ``out_weight`` [E, D, H],
    ``out_bias`` [E, D]; gated experts also ``gate_weight`` [E, H, D], ``gate_bias`` [E, H]; with a norm ``ln_weight``
    and ``ln_bias`` [E, H] (open_clip's optimizer excludes names with "ln" from weight decay). ``bias=False``:
    projections without biases. A shared expert's parameters have the same names under ``shared.``, [1, ...]. A
    selection bias is the buffer ``router.selection_bias`` [E].

    With a ``granularity`` G the experts are shards of MLPs, and y is G times that sum (a whole MLP is the sum of G
    shards). With a ``shared_expert``, ``y = (shared(x) + sum_k gate_k * expert_k(x)) / 2``.

    Types: x and the experts' weights must have the same floating type, as in ``nn.Linear``; inside autocast both are
    cast to its type. y has that type. The router, the gates and the losses are float32, or float64 like x.

    Losses: a forward pass in training mode with gradients enabled stores its weighted losses in the layer until
    ``aux_loss`` takes them. Each forward pass counts once; the recomputation of activation checkpointing does not
    count. An untaken loss is dropped when backward runs through y. Losses, and what ``moe_metrics`` shows, belong to
    the thread that ran the forward pass. Reentrant checkpointing, and any other ``autograd.Function`` around a layer,
    runs the forward pass without gradients, so that no losses are stored and no load is counted; a warning says so
    once. Use ``use_reentrant=False``. Under ``torch.compile`` a layer holds only the losses of
    its last forward pass, and backward through y does not drop them: take them at every step. Inside a transform of
    ``torch.func``, take losses inside the transform; routing and load are not recorded.

    Args:
        d_model: D.
        d_hidden: H, of every expert; a shared expert has granularity * d_hidden.
        config: how many experts there are, how tokens are routed, and the auxiliary losses; None means ``MoEConfig()``.
            ``layer.config`` holds it; assigning another config takes effect at the next forward, and is saved with a
            model whose layers all have it.
        activation: one of ``clipup_kernels.ACTIVATIONS``.
        bias: whether the projections have biases.
        gated: experts compute ``act(W_gate x + b_gate) * (W_in x + b_in)`` before the output projection.
        norm: "layer" gives every expert its own layer norm between its projections.
        norm_eps: added to that norm's variance.
        dropout: probability of dropping an entry between the projections in training, before the norm. With a norm, and
            with dropout in training, experts run on the unfused ops.
        device, dtype: of all parameters.
        overrides: fields of ``MoEConfig`` instead of those of ``config``: ``SparseMoE(768, 3072, num_experts=16)``.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        config: MoEConfig | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        gated: bool = False,
        norm: Literal["layer"] | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Unpack[LayerOptions],
    ) -> None:
        config = layer_config(config, overrides)
        mlp: dict[str, Any] = {"activation": activation, "bias": bias, "gated": gated, "norm": norm}
        mlp |= {"norm_eps": norm_eps, "dropout": dropout, "device": device, "dtype": dtype}
        super().__init__(d_model, d_hidden, config.num_experts, **mlp)
        self.router = Router(d_model, config, device=device, dtype=dtype)
        shared = SharedExpert(d_model, config.granularity * d_hidden, 1, **mlp) if config.shared_expert else None
        self.shared = shared
        self.state = LayerState()

    @classmethod
    def from_dense(
        cls, mlp: nn.Module | tuple[nn.Module, nn.Module] | DenseMLP, config: MoEConfig | None = None
    ) -> SparseMoE:
        """E copies of a dense MLP behind a newly initialized router, on the MLP's device and in its type.

        Parameters keep the ``requires_grad`` of those they are copied from; the router is trainable if any of them is.
        With normalized gates (``normalize_gates`` not "none"), no re-initialized hidden units (``reinit_ratio``), no
        dropped tokens and, with shards, no router noise, the layer computes the same function as the MLP:

        - with a shared expert, because it and the normalized sum of the routed experts both equal the MLP;
        - with a granularity, because the router initializes the shards of a virtual group with the same row, so that
          whole groups are selected, each shard with the same gate.

        Args:
            mlp: an MLP of a family in ``clipup.dense.mlp_readers``, such as ``nn.Sequential(nn.Linear(D, H), nn.GELU(),
                nn.Linear(H, D))``, or of any other a ``DenseMLP`` of its tensors (``clipup.dense.dense_mlp``). Where
                its projections lie in two modules, as in BERT: both, ``(layer.intermediate, layer.output)``; what else
                the second does, such as the residual and its norm, is left out.
            config: None means ``MoEConfig()``.

        Raises:
            TypeError: the MLP belongs to no family in ``clipup.dense.mlp_readers``, or has a norm in front
                of its projections, which is not part of an expert (``upcycle`` keeps it in front of the layer).
            TypeError, ValueError: the MLP does not split into ``config.granularity`` shards.
        """
        parts = mlp if isinstance(mlp, tuple) else (mlp,)
        dense = mlp if isinstance(mlp, DenseMLP) else read_mlp(*parts)
        if dense.input_norm is not None:
            raise TypeError(
                "the MLP has a norm in front of its projections, which is not part of an expert; use clipup.upcycle, "
                "or read the MLP with clipup.dense.mlp_families.read_mlp and put its input_norm in front of the layer"
            )
        config = config if config is not None else MoEConfig()
        d_hidden, d_model = dense.in_weight.shape
        experts = experts_of(dense, config.num_experts, config.granularity, config.reinit_ratio)
        layer = cls(
            d_model,
            d_hidden // config.granularity,
            config,
            activation=dense.activation,
            bias=dense.in_bias is not None,
            gated=dense.gate_weight is not None,
            device="meta",
            dtype=dense.in_weight.dtype,
            norm=None if dense.ln_weight is None else "layer",
            norm_eps=dense.ln_eps,
            dropout=dense.dropout,
        )
        trained = {name: source.requires_grad for name, source in dense.parameters().items()}
        layer.set_experts(experts, trained)
        if layer.shared is not None:
            layer.shared.set_experts(experts_of(dense, num_experts=1), trained)
        layer.router.to_empty(device=dense.in_weight.device).requires_grad_(any(trained.values()))
        layer.router.reset_to_virtual_groups()
        layer.train(all(part.training for part in parts if isinstance(part, nn.Module)))
        return layer

    c_fc = property(lambda self: FirstLinear(self.in_weight))

    @property
    def config(self) -> MoEConfig:
        return self.router.config

    @config.setter
    def config(self, config: MoEConfig) -> None:
        self.router.config = config

    def reset_parameters(self) -> None:
        """Re-initializes every expert independently, as ``nn.Linear`` does, and the router."""
        self.router.reset_parameters()
        self.reset_experts()
        if self.shared is not None:
            self.shared.reset_experts()

    @overload
    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_routing: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_routing: Literal[True]
    ) -> tuple[Tensor, TokenRouting]: ...
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, TokenRouting]:
        """
        Args:
            x: [..., D].
            mask: x's leading dimensions; False, or 0 in a mask of integers such as those of transformers' tokenizers,
                for masked tokens. There y is 0, and the token counts neither towards capacity nor in losses.
            return_routing: also return the gates, experts and dropped choices of every token.

        Returns:
            y: [..., D] in x's type, or autocast's; with ``return_routing`` (y, ``TokenRouting``).
        """
        self._check(x, mask)
        tokens = x.reshape(-1, self.d_model).contiguous()  # the router rounds a strided view differently
        token_mask = None if mask is None else mask.reshape(-1).bool()
        dtype = autocast_dtype(x)
        with nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False):
            routing = self.router(tokens, token_mask)
            y = self._mixture(tokens, routing, dtype)
            learns = self.training and torch.is_grad_enabled()
            loss = self._losses(routing) if learns and self.config.has_losses else None
        if not (recomputing() or torch.compiler.is_exporting()):
            balances = self.config.selection_bias != "none"
            if self.training and not learns and (balances or self.config.has_losses):
                warn_inside_function()
            self.state.keep(routing, y, loss, counts_load=learns and balances, evaluates=not self.training)
        # autograd must not see a view: if one is changed in place, FSDP2 loses its hook
        y = torch.ops.aten._unsafe_view(y, x.shape)
        return (y, TokenRouting.of(routing, x.shape[:-1])) if return_routing else y

    def _losses(self, routing: Routing) -> Tensor:
        """[] float32."""
        if self.config.loss_scope == "batch":
            return weighted_losses(routing, self.config)
        counts = self.state.step_counts
        if counts is None:
            counts = over_ranks([StepCounts.of_batch(routing.gating.tokens_per_expert)])[0]
        return weighted_losses(routing, self.config, counts)

    def _mixture(self, tokens: Tensor, routing: Routing, dtype: torch.dtype | None) -> Tensor:
        """[T, D]."""
        scale = self.gate_scale()
        y = self.run_experts(tokens, routing.gates if scale == 1 else scale * routing.gates, routing.plan, dtype)
        return y if self.shared is None else y + self.shared(tokens, routing.mask, dtype, SHARED_GATE)

    def gate_scale(self) -> float:
        """Gates that sum to 1 over shards give 1/granularity of an MLP's output. NVIDIA (arXiv 2410.07524) scales the
        weights to compensate; here the gates are scaled, so that the experts' projections stay bitwise those of the
        dense MLP."""
        return self.config.granularity * (1.0 if self.shared is None else 1 - SHARED_GATE)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.is_nested:
            raise TypeError(
                "x is a nested tensor; pass a padded one, x.to_padded_tensor(0.0), and the mask of its tokens "
                "(nn.TransformerEncoder makes nested ones in evaluation unless enable_nested_tensor=False)"
            )
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [..., {self.d_model}], the layer's d_model last, got {list(x.shape)}")
        if x.dtype != self.in_weight.dtype and autocast_dtype(x) is None:
            raise TypeError(
                f"x is {x.dtype} but the experts' weights are {self.in_weight.dtype}; cast one of them, or use "
                "torch.autocast, where the layer casts both (but not from float64)"
            )
        if mask is None:
            return
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(
                f"mask must be torch.bool or of integers, True or 1 for tokens that are not masked, got {mask.dtype}; "
                "of an additive mask, with 0 for them, pass mask == 0"
            )
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must have x's leading dimensions {list(x.shape[:-1])}, got {list(mask.shape)}")

    def extra_repr(self) -> str:
        parts = [f"{self.d_model}, {self.d_hidden}", f"activation={self.activation!r}"]
        parts += ["gated=True"] * (self.gate_weight is not None) + ["norm='layer'"] * (self.ln_weight is not None)
        defaults = vars(MoEConfig())
        parts += [f"{name}={value!r}" for name, value in vars(self.config).items() if value != defaults[name]]
        return ", ".join(parts)


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """The sparse layers of a model by name, in the order in which its modules are registered.

    Raises:
        TypeError: ``model`` is not a module.
    """
    checks.module("model", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}


def saved_config(model: nn.Module) -> MoEConfig | None:
    """The config that makes the model's sparse layers again: the layers' own, in the blocks of ``model.moe_config``;
    None for a model that was not upcycled.

    Raises:
        ValueError: the layers' configs differ, and only one can be saved.
    """
    model_config: Any = getattr(model, "moe_config", None)
    layers = moe_layers(model)
    if model_config is None or not layers:
        return model_config
    routers = {type(layer.router) for layer in layers.values()}
    if own := [each.__name__ for each in routers if getattr(each, "logits", Router.logits) is not Router.logits]:
        warnings.warn(f"the class {own[0]} of a router is not saved: assign it again to the loaded model", stacklevel=2)
    of_model = {name: getattr(model_config, name) for name in CREATION_FIELDS}
    first, *others = ((name, layer.config.replace(**of_model)) for name, layer in layers.items())
    for name, config in others:
        if fields := [field for field, value in vars(config).items() if value != getattr(first[1], field)]:
            raise ValueError(
                f"{name}.config differs from {first[0]}.config ({', '.join(fields)}), but one config is saved for all: "
                "give every layer in clipup.moe_layers(model) the same"
            )
    return first[1]


def aux_loss(model: nn.Module) -> Tensor:
    """Takes the weighted auxiliary losses of the calling thread's forward passes and returns their sum.

    Add it to the loss of each forward pass, or of several at once. The losses of a forward pass count once, and not at
    all if another came after it and its outputs are no longer in use. Returns a 0-d tensor, float32 (float64 of
    float64 layers), 0 if there is nothing to take (evaluation, no weights, no sparse layers). Where the last forward
    pass recorded gradients in evaluation mode, a warning says so once.

    The losses of a forward pass belong to the thread that ran it, so several threads can train or evaluate one model.
    If other threads run the forward passes of a step (``nn.DataParallel``), call ``aux_loss`` there too, inside the
    wrapped module, and return its value with the output.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: there is nothing to take, but there are untaken losses of a thread that has ended, or of any other
            thread if the calling thread has not run the model itself.
    """
    layers = moe_layers(model).values()
    _warn_of_evaluation(layers)
    taken = [loss for layer in layers for loss in layer.state.take_losses()]
    if not (taken or torch.compiler.is_compiling()) and any(layer.state.untaken_elsewhere() for layer in layers):
        raise RuntimeError(
            "aux_loss found no losses of this thread, but some that forwards left in other threads. A forward's losses "
            "belong to the thread that ran it: call aux_loss there, with nn.DataParallel inside the wrapped module, "
            "and return its value with the output"
        )
    return _sum(taken, model)


def _warn_of_evaluation(layers: Collection[SparseMoE]) -> None:
    """Warns, once in a thread, about layers that recorded gradients in evaluation mode, where they have no losses."""
    if torch.compiler.is_compiling():
        return
    if count := sum(layer.state.take_evaluated() for layer in layers):
        warnings.warn(
            f"{count} of {len(layers)} sparse layers recorded gradients in evaluation mode, where they have no losses, "
            "no capacity of training and no router noise: call model.train() before training (models are loaded in "
            "evaluation mode), or evaluate under torch.no_grad()",
            stacklevel=3,
        )


def _sum(losses: Collection[Tensor], model: nn.Module) -> Tensor:
    first = next(iter((*losses, *model.parameters())), None)
    if not losses or first is None:
        return torch.zeros((), device=None if first is None else first.device)
    return torch.stack([loss.to(first.device) for loss in losses]).sum()


class CollectedLosses:
    """The weighted auxiliary losses of the forward passes in a ``with collect_aux_losses(model)`` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._taken: dict[str, Tensor] | None = None

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """By the layer's name; 0-d float32 tensors with their graphs.

        Raises:
            RuntimeError: the block has not ended.
        """
        if self._taken is None:
            raise RuntimeError("collect_aux_losses takes the losses when its block ends: read them after it")
        return self._taken

    @property
    def total(self) -> Tensor:
        """Their sum; 0 if there are none. Raises as ``by_layer`` does."""
        return _sum(self.by_layer.values(), self._model)


@contextmanager
def collect_aux_losses(model: nn.Module) -> Iterator[CollectedLosses]:
    """Takes the auxiliary losses of the forward passes inside the block, layer by layer, instead of ``aux_loss``::

        with clipup.collect_aux_losses(model) as losses:
            out = model(images, texts)
        loss = contrastive(*out) + losses.total

    Losses that were there before are dropped. If the block is left by an error, nothing is kept.

    Raises:
        TypeError: ``model`` is not a module.
    """
    layers = moe_layers(model)
    collected = CollectedLosses(model)
    for layer in layers.values():
        layer.state.take_losses()
    try:
        yield collected
        _warn_of_evaluation(layers.values())
    finally:
        taken = {name: layer.state.take_losses() for name, layer in layers.items()}
        collected._taken = {}
    collected._taken = {name: torch.stack(losses).sum() for name, losses in taken.items() if losses}
