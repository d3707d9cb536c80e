"""``MoEConfig``: what becomes sparse, how tokens are routed, and which losses keep the routing healthy.

Frozen and JSON both ways; it is stored as ``moe_cfg`` beside open_clip's ``model_cfg``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from clipup_kernels import MAX_EXPERTS

from ..checks import boolean, check, is_int, number, positive_number

GateNormalization = Literal["none", "before_drop", "after_drop"]
BalanceForm = Literal["top2", "topk"]
ScoreFunction = Literal["softmax", "sigmoid"]
SelectionBias = Literal["none", "sign", "z_score"]
Blocks = Literal["every_other", "every"]
Tower = Literal["image", "text", "decoder"]

_WEIGHTS = (
    "balance_weight",
    "z_weight",
    "importance_weight",
    "load_weight",
    "local_entropy_weight",
    "global_entropy_weight",
)
_MODEL_FIELDS = ("towers", "blocks", "last_blocks", "padding_aware", "reinit_ratio")


_CHOICES = {
    "normalize_gates": GateNormalization,
    "balance": BalanceForm,
    "score_function": ScoreFunction,
    "selection_bias": SelectionBias,
}


@dataclass(frozen=True)
class MoEConfig:
    """Options of the sparse layers. A bad value raises ``ValueError`` or ``TypeError`` that names it.

    Where each choice comes from, and how sure that is: docs/recipe.md.
    """

    num_experts: int = 8
    """Experts in a layer (E)."""
    top_k: int = 2
    """Experts that every token is sent to (K), at most num_experts."""
    granularity: int = 1
    """Parts into which a dense MLP's hidden width is split, an expert being one part (fine-grained experts). It divides
    num_experts and top_k, which count parts: 32 experts, top 8, granularity 4 cost what 8 experts, top 2 cost."""
    shared_expert: bool = False
    """A copy of the whole dense MLP that every token takes beside its K experts; each gives half of the output."""
    reinit_ratio: float = 0.0
    """Share of its hidden units that every expert draws anew when a dense MLP is upcycled (Drop-Upcycling; 0.5 there).
    The shared expert keeps all."""
    capacity_factor: float | None = None
    """An expert takes at most ceil(capacity_factor*K*T/E) of T tokens' choices in training. None drops nothing."""
    eval_capacity_factor: float | None = None
    """The same in evaluation. None: nobody's embedding depends on who else is in the batch."""
    normalize_gates: GateNormalization = "before_drop"
    """Where a token's K gates are scaled to sum to 1: before over-capacity choices are dropped, after, or nowhere."""
    priority: bool = False
    """Give slots to tokens with a large router probability first (batch-priority routing) instead of by position."""
    router_noise: float = 0.0
    """Normal noise on the router's logits in training, its standard deviation in units of 1/num_experts (V-MoE)."""
    score_function: ScoreFunction = "softmax"
    """What makes router probabilities of logits: softmax, or sigmoids divided by their sum over all experts."""
    selection_bias: SelectionBias = "none"
    """Balance by a bias an expert that is added to the probabilities for choosing only, and moved after every step by
    the load: by its sign (loss-free balancing) or by its z-score."""
    selection_bias_rate: float = 1e-3
    """How far a step moves that bias, in units of a router probability."""
    towers: tuple[Tower, ...] = ("image", "text")
    """Towers that become sparse; the others stay dense. A CoCa has a decoder too."""
    blocks: Blocks | tuple[int, ...] = "every_other"
    """Blocks that become sparse: every other one, block 0 dense (1, 3, ...), every one, or indices (negative from the
    end)."""
    last_blocks: int | None = None
    """Of the blocks that a word for blocks means, only the last n in each tower (with every_other: V-MoE's Last-n)."""
    padding_aware: bool = True
    """Leave the tokens behind a text's end out of routing, capacity and losses, in text towers whose features they
    never reach (causal, pooled at end-of-text). It means nothing in other towers."""
    balance_weight: float = 0.0
    """Weight of the load-balance loss, which is 1 when balanced."""
    balance: BalanceForm = "topk"
    """Picks that the balance loss counts: first choices only (top2), or all choices (topk)."""
    z_weight: float = 0.0
    """Weight of the router z-loss."""
    importance_weight: float = 0.0
    """Weight of V-MoE's importance loss."""
    load_weight: float = 0.0
    """Weight of V-MoE's load loss, which needs router_noise > 0."""
    local_entropy_weight: float = 0.0
    """Weight of LIMoE's local entropy (of each token's router distribution), in nats."""
    global_entropy_weight: float = 0.0
    """Weight of LIMoE's global entropy loss (of the mean router distribution), in nats."""
    entropy_threshold: float | None = None
    """Nats of global entropy above which there is nothing to pay. None: log(num_experts)."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "granularity"):
            check(name, getattr(self, name), is_int(getattr(self, name)), "an int", TypeError)
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("num_experts", self.num_experts, self.num_experts <= MAX_EXPERTS, f"at most {MAX_EXPERTS}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts}): a token goes at most once to "
                "each expert; lower top_k or raise num_experts"
            )
        for name in ("num_experts", "top_k"):
            if getattr(self, name) % self.granularity:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) is not a multiple of granularity ({self.granularity}): it counts "
                    f"parts of MLPs, and {self.granularity} of them make a whole one; round it up or down"
                )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None:
                number(name, value)
                check(name, value, value > 0, "positive, or None to drop nothing")
        for name in ("router_noise", *_WEIGHTS):
            number(name, getattr(self, name))
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        if self.entropy_threshold is not None:
            number("entropy_threshold", self.entropy_threshold)
            check("entropy_threshold", self.entropy_threshold, self.entropy_threshold >= 0, "0 or more, or None")
        for name, values in _CHOICES.items():
            choices = get_args(values)
            check(name, getattr(self, name), getattr(self, name) in choices, f"one of {', '.join(choices)}")
        positive_number("selection_bias_rate", self.selection_bias_rate)
        number("reinit_ratio", self.reinit_ratio)
        check("reinit_ratio", self.reinit_ratio, 0 <= self.reinit_ratio <= 1, "between 0 and 1")
        for name in ("priority", "padding_aware", "shared_expert"):
            boolean(name, getattr(self, name))
        if self.load_weight > 0 and self.router_noise == 0:
            raise ValueError("load_weight > 0 needs router_noise > 0: the load loss is a probability under that noise")
        if self.load_weight > 0 and self.selection_bias != "none":
            raise ValueError(
                f"load_weight > 0 has no meaning with selection_bias={self.selection_bias!r}: the load loss is about "
                "the experts with the largest logits, and the bias chooses others; drop one of them"
            )
        self._check_model_fields()

    def _check_model_fields(self) -> None:
        for name in ("towers", "blocks"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        towers = self.towers
        known = isinstance(towers, tuple) and towers and all(tower in get_args(Tower) for tower in towers)
        expected = 'a tuple of "image", "text" and "decoder", each once'
        check("towers", towers, known and len(set(towers)) == len(towers), expected)
        named = self.blocks in get_args(Blocks)
        if not named:
            indices = isinstance(self.blocks, tuple) and self.blocks and all(is_int(block) for block in self.blocks)
            check("blocks", self.blocks, indices, '"every_other", "every" or a tuple of block indices')
        if self.last_blocks is not None:
            check("last_blocks", self.last_blocks, is_int(self.last_blocks), "an int or None", TypeError)
            check("last_blocks", self.last_blocks, self.last_blocks >= 1, "at least 1, or None for all")
            if not named:
                raise ValueError(
                    f"last_blocks={self.last_blocks} has no meaning with a list of blocks, {self.blocks}; list fewer"
                )

    @classmethod
    def clip_up(cls, **overrides: Any) -> MoEConfig:
        """The CLIP-UP recipe (arXiv 2502.00965): 8 experts, top 2, every other block of both towers, capacity factor 1.

        The capacity factor is derived from the paper's numbers; the weights of the losses (balance 0.01, z 1e-4) are
        common values, not confirmed by its text.
        """
        return cls(**{"capacity_factor": 1.0, "balance_weight": 0.01, "z_weight": 1e-4, "balance": "top2", **overrides})

    def replace(self, **changes: Any) -> MoEConfig:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    @property
    def keeps_function(self) -> bool:
        """Whether an upcycled model computes, with nothing dropped, what the dense one does."""
        return self.normalize_gates != "none" and self.reinit_ratio == 0

    @property
    def has_losses(self) -> bool:
        """Whether any auxiliary loss has a weight."""
        return any(getattr(self, name) > 0 for name in _WEIGHTS)

    @property
    def global_entropy_threshold(self) -> float:
        """The threshold in force, in nats."""
        return math.log(self.num_experts) if self.entropy_threshold is None else self.entropy_threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """The inverse of ``to_dict``; missing fields take their defaults, unknown ones raise ``ValueError``."""
        if not isinstance(values, dict):
            raise TypeError(f"moe_cfg must be a JSON object, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"moe_cfg has unknown fields {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> MoEConfig:
        return cls.from_dict(json.loads(text))


def layer_config(config: MoEConfig | None, overrides: dict[str, Any]) -> MoEConfig:
    """The config of a single layer.

    Raises:
        TypeError: ``config`` is not a MoEConfig, or an override is not one of the fields that concern a layer.
    """
    if config is not None:
        check_config("config", config)
    known = [field.name for field in dataclasses.fields(MoEConfig) if field.name not in _MODEL_FIELDS]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; those of the routing are {', '.join(known)}"
        raise TypeError(f"{unknown[0]} is not an option of a sparse layer{hint}")
    return (config or MoEConfig()).replace(**overrides)


def check_config(name: str, value: object) -> None:
    if not isinstance(value, MoEConfig):
        advice = "; make one with MoEConfig.from_dict" if isinstance(value, dict) else ""
        if isinstance(value, int):
            advice = f"; did you mean num_experts={value}?"
        raise TypeError(f"{name} must be a clipup.MoEConfig, got {type(value).__name__}{advice}")
