"""``MoEConfig``: which blocks become sparse, how tokens are routed, and the auxiliary losses.

Frozen, converted to and from JSON; stored as ``moe_cfg`` beside open_clip's ``model_cfg``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args, get_origin

from typing_extensions import Unpack

from ..checks import boolean, check, is_int, not_negative, one_of, positive_number, width

GateNormalization = Literal["none", "before_drop", "after_drop"]
BalanceForm = Literal["top2", "topk"]
ScoreFunction = Literal["softmax", "sigmoid"]
SelectionBias = Literal["none", "sign", "z_score"]
RoutingKind = Literal["token_choice", "expert_choice"]
LossScope = Literal["batch", "global_batch"]
Blocks = Literal["every_other", "every"]
Tower = Literal["image", "text", "decoder"]
DEFAULT_TOWERS: tuple[Tower, ...] = ("image", "text")

_OUTPUT = "output"
"""Marks a field that outputs in evaluation depend on. They also depend on the blocks, which the names of weights
show."""
_NO_AVERAGE = "no average"
"""Marks the weight of a loss that is not an average over tokens, so that it cannot be computed batch by batch."""
_TOKEN_CHOICE = "token choice"
"""Marks a field about experts that tokens choose; its default turns it off."""
_POSITIVE = "positive"
"""Marks a number that must not be 0."""


def _field(default: Any, *marks: str) -> Any:
    return dataclasses.field(default=default, metadata=dict.fromkeys(marks, True))


class LayerOptions(TypedDict, total=False):
    """The fields of ``MoEConfig`` that concern a single layer, as keyword arguments."""

    num_experts: int
    top_k: int
    granularity: int
    shared_expert: bool
    routing: RoutingKind
    capacity_factor: float | None
    eval_capacity_factor: float | None
    normalize_gates: GateNormalization
    priority: bool
    router_noise: float
    score_function: ScoreFunction
    selection_bias: SelectionBias
    selection_bias_rate: float
    balance_weight: float
    balance: BalanceForm
    loss_scope: LossScope
    z_weight: float
    importance_weight: float
    load_weight: float
    local_entropy_weight: float
    global_entropy_weight: float
    entropy_threshold: float | None


class MoEOptions(LayerOptions, total=False):
    """All fields of ``MoEConfig``, as keyword arguments."""

    reinit_ratio: float
    towers: tuple[Tower, ...] | None
    blocks: Blocks | tuple[int, ...]
    last_blocks: int | None
    padding_aware: bool


_OF_MODELS = MoEOptions.__annotations__.keys() - LayerOptions.__annotations__.keys()
CREATION_FIELDS = tuple(_OF_MODELS - {"padding_aware"})
"""Fields used only to create layers: which blocks become sparse, and their initial weights."""


@dataclass(frozen=True)
class MoEConfig:
    """Options of the sparse layers. An invalid value raises a ``ValueError`` or ``TypeError`` that names it.

    The source of each default, and how certain it is: docs/recipe.md.
    """

    num_experts: int = _field(8, _OUTPUT)
    """Experts per layer (E)."""
    top_k: int = _field(2, _OUTPUT)
    """Experts per token (K), at most num_experts."""
    granularity: int = _field(1, _OUTPUT, _TOKEN_CHOICE)
    """Shards into which a dense MLP's hidden width is split; each expert is one shard (fine-grained experts). It
    divides num_experts and top_k, which count shards: 32 experts, top 8, granularity 4 cost as much as 8 experts, top
    2."""
    shared_expert: bool = _field(False, _OUTPUT)
    """Add a copy of the whole dense MLP that processes every token beside its K experts; each contributes half of the
    output."""
    reinit_ratio: float = 0.0
    """Fraction of its hidden units that every expert re-initializes when a dense MLP is upcycled (Drop-Upcycling, which
    uses 0.5). The shared expert keeps all."""
    routing: RoutingKind = _field("token_choice", _OUTPUT)
    """Who chooses: each token its top_k experts, or each expert its ceil(capacity_factor*K*T/E) tokens, those with the
    largest router probabilities (expert choice). A capacity factor of None is then 1, in evaluation that of training. A
    token may have any number of experts, and its output depends on the other tokens of the batch, in evaluation too."""
    capacity_factor: float | None = _field(None, _POSITIVE)
    """In training an expert accepts at most ceil(capacity_factor*K*T/E) of the choices of T tokens. None drops
    nothing."""
    eval_capacity_factor: float | None = _field(None, _OUTPUT, _POSITIVE)
    """The same in evaluation. None: an embedding does not depend on the rest of the batch."""
    normalize_gates: GateNormalization = _field("before_drop", _OUTPUT)
    """When a token's K gates are scaled to sum to 1: before choices over capacity are dropped, after, or not at all. A
    single gate is then always 1, so that with top_k 1 the task loss does not train the router."""
    priority: bool = _field(False, _OUTPUT, _TOKEN_CHOICE)
    """Assign slots by descending router probability (batch-priority routing), instead of in an order that every layer
    draws anew in training. Training breaks ties by such a draw; evaluation breaks them, and without priority assigns
    slots, by position."""
    router_noise: float = 0.0
    """Standard deviation of normal noise on the router's logits in training, in units of 1/num_experts (V-MoE)."""
    score_function: ScoreFunction = _field("softmax", _OUTPUT)
    """How logits become router probabilities: softmax, or sigmoids divided by their sum over all experts."""
    selection_bias: SelectionBias = _field("none", _TOKEN_CHOICE)
    """Loss-free balancing: a bias per expert that affects expert selection but not the gates, updated after every step
    by the sign of the load's deviation from the mean, or by its z-score."""
    selection_bias_rate: float = _field(1e-3, _POSITIVE)
    """Size of an update of that bias, in units of router probability."""
    towers: tuple[Tower, ...] | None = None
    """Towers that become sparse; the others stay dense. None: image and text, as far as the model has them. A CoCa also
    has a decoder."""
    blocks: Blocks | tuple[int, ...] = "every_other"
    """Blocks that become sparse: every other one (1, 3, ...; block 0 stays dense), every one, or indices (negative ones
    count from the end)."""
    last_blocks: int | None = None
    """Only the last n of the blocks that "every_other" or "every" selects, in each tower (V-MoE's Last-n)."""
    padding_aware: bool = _field(True, _OUTPUT)
    """Exclude the tokens after a text's end from routing, capacity and losses, in text towers whose features do not
    depend on them (causal, pooled at end-of-text). No effect in other towers."""
    balance_weight: float = 0.0
    """Weight of the load-balance loss, which is 1 for uniform routing, and so always with expert choice."""
    balance: BalanceForm = "topk"
    """Choices that the balance loss counts: first choices only (top2), or all choices (topk)."""
    loss_scope: LossScope = _field("batch", _TOKEN_CHOICE)
    """Tokens that the balance loss, z-loss and local entropy average over: those of each batch on each rank, or of the
    whole step (global_batch, arXiv 2501.11873), so that they do not depend on how the step is divided: over ranks, and
    in clipup's training over accumulated batches too."""
    z_weight: float = 0.0
    """Weight of the router z-loss."""
    importance_weight: float = _field(0.0, _NO_AVERAGE)
    """Weight of V-MoE's importance loss."""
    load_weight: float = _field(0.0, _NO_AVERAGE, _TOKEN_CHOICE)
    """Weight of V-MoE's load loss, which needs router_noise > 0."""
    local_entropy_weight: float = 0.0
    """Weight of LIMoE's local entropy loss (entropy of each token's router distribution), in nats."""
    global_entropy_weight: float = _field(0.0, _NO_AVERAGE)
    """Weight of LIMoE's global entropy loss (entropy of the mean router distribution), in nats."""
    entropy_threshold: float | None = None
    """Global entropy, in nats, above which that loss is 0. None: log(num_experts)."""

    def __post_init__(self) -> None:
        for name in ("towers", "blocks"):
            if isinstance(getattr(self, name), list):  # as in JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        positive = _marked(_POSITIVE)
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if kind is int:
                width(name, value)
            elif kind is bool:
                boolean(name, value)
            elif get_origin(kind) is Literal:
                one_of(name, value, get_args(kind))
            elif kind is float or (kind == float | None and value is not None):
                (positive_number if name in positive else not_negative)(name, value)
        check("reinit_ratio", self.reinit_ratio, self.reinit_ratio <= 1, "between 0 and 1")
        self._check_blocks()
        self._check_combinations()
        if self.top_k == 1 < self.num_experts and not self.experts_choose and self.normalize_gates != "none":
            warnings.warn(
                "with top_k=1, normalized gates are always 1, so the task loss does not train the router; "
                "normalize_gates='none' lets it, and an upcycled model then starts from another function",
                stacklevel=3,
            )

    def _check_blocks(self) -> None:
        towers, blocks, last = self.towers, self.blocks, self.last_blocks
        valid = isinstance(towers, tuple) and len(towers) > 0 and set(towers) <= set(get_args(Tower))
        expected = 'None, or a tuple of "image", "text" and "decoder", each once'
        check("towers", towers, towers is None or (valid and len(set(towers)) == len(towers)), expected)
        named = isinstance(blocks, str) and blocks in get_args(Blocks)
        indices = isinstance(blocks, tuple) and len(blocks) > 0 and all(map(is_int, blocks))
        check("blocks", blocks, named or indices, '"every_other", "every" or a tuple of block indices')
        positive = last is None or (named and is_int(last) and last >= 1)
        check("last_blocks", last, positive, "None for all or, without a list of blocks, an int of at least 1")

    def _check_combinations(self) -> None:
        shards = (
            f"is not a multiple of granularity ({self.granularity}): it counts shards of MLPs, and {self.granularity} "
            "shards make a whole MLP; round it up or down"
        )
        weighted = [name for name in _marked(_NO_AVERAGE) if getattr(self, name) > 0]
        unused = [name for name, default in _marked(_TOKEN_CHOICE).items() if getattr(self, name) != default]
        unused += ["a decoder in towers"] * ("decoder" in (self.towers or ()))
        for refused, why in (
            (self.top_k > self.num_experts, f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts})"),
            (self.num_experts % self.granularity, f"num_experts ({self.num_experts}) {shards}"),
            (self.top_k % self.granularity, f"top_k ({self.top_k}) {shards}"),
            (
                self.load_weight > 0 and self.router_noise == 0,
                "load_weight > 0 needs router_noise > 0: the load loss is a probability under that noise",
            ),
            (
                self.load_weight > 0 and self.selection_bias != "none",
                f"load_weight > 0 cannot be combined with selection_bias={self.selection_bias!r}: the load loss "
                "assumes that the experts with the largest logits are selected, which the bias changes; use one of "
                "them",
            ),
            (
                self.loss_scope == "global_batch" and weighted,
                f"loss_scope='global_batch' cannot be combined with {', '.join(weighted)} > 0: that loss is not an "
                "average over tokens; use balance_weight, or loss_scope='batch'",
            ),
            (
                self.experts_choose and unused,
                f"routing={self.routing!r} cannot be combined with {', '.join(unused)}: tokens do not choose experts, "
                "and which experts they get depends on all tokens of the batch",
            ),
        ):
            if refused:
                raise ValueError(why)

    @classmethod
    def clip_up(cls, **overrides: Unpack[MoEOptions]) -> MoEConfig:
        """The CLIP-UP recipe (arXiv 2502.00965): 8 experts, top 2, every other block of both towers, capacity factor 1.

        The capacity factor is derived from the paper's numbers; the loss weights (balance 0.01, z 1e-4) are common
        values, not confirmed by the paper's text.
        """
        preset: MoEOptions = {"capacity_factor": 1.0, "balance_weight": 0.01, "z_weight": 1e-4, "balance": "top2"}
        options: MoEOptions = {**preset, **overrides}
        return cls(**options)

    @property
    def experts_choose(self) -> bool:
        """Whether experts choose tokens: a token may have any number of experts, and the capacity factor drops none."""
        return self.routing == "expert_choice"

    @property
    def mean_choices(self) -> int:
        """Experts that compute a token, without dropping; on average and rounded up where experts choose."""
        if not self.experts_choose:
            return self.top_k
        return min(self.num_experts, math.ceil(self.top_k * self.expert_choice_factor(training=True)))

    def expert_choice_factor(self, training: bool) -> float:
        """f: each expert takes ceil(f*K*T/E) of T tokens."""
        factor = self.capacity_factor if training or self.eval_capacity_factor is None else self.eval_capacity_factor
        return 1.0 if factor is None else factor

    def replace(self, **changes: Unpack[MoEOptions]) -> MoEConfig:
        """A copy with some fields changed, validated like a new config."""
        return dataclasses.replace(self, **changes)

    @property
    def keeps_function(self) -> bool:
        """Whether an upcycled model computes the same function as the dense one if nothing is dropped."""
        return self.normalize_gates != "none" and self.reinit_ratio == 0 and not self.experts_choose

    def differing(self, other: MoEConfig) -> list[str]:
        """The fields for which layers with the same weights compute something else in evaluation."""
        names = (*_marked(_OUTPUT), *("capacity_factor",) * (self.experts_choose or other.experts_choose))
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @property
    def has_losses(self) -> bool:
        """Whether any auxiliary loss has a weight."""
        return any(getattr(self, name) > 0 for name in LOSS_WEIGHTS)

    @property
    def global_entropy_threshold(self) -> float:
        """The effective threshold, in nats."""
        return math.log(self.num_experts) if self.entropy_threshold is None else self.entropy_threshold

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of values that JSON can represent."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """The inverse of ``to_dict``; missing fields get their defaults, unknown ones raise ``TypeError``."""
        return cls(**values)


_TYPES = typing.get_type_hints(MoEConfig)


def _marked(mark: str) -> dict[str, Any]:
    """The defaults of the fields with a mark."""
    return {field.name: field.default for field in dataclasses.fields(MoEConfig) if mark in field.metadata}


LOSS_WEIGHTS = tuple(field.name for field in dataclasses.fields(MoEConfig) if field.name.endswith("_weight"))
"""The fields that are weights of auxiliary losses: those named ``LOSS_weight``."""


def layer_config(config: MoEConfig | None, overrides: LayerOptions) -> MoEConfig:
    """The config of a single layer.

    Raises:
        TypeError: ``config`` is not a MoEConfig, or an override is not one of the fields that concern a layer.
    """
    check_config("config", MoEConfig() if config is None else config)
    if of_models := ", ".join(sorted(overrides.keys() & _OF_MODELS)):
        raise TypeError(f"{of_models}: not an option of a sparse layer, but of upcycling a model")
    return (config or MoEConfig()).replace(**overrides)


def check_config(name: str, value: object) -> None:
    if not isinstance(value, MoEConfig):
        raise TypeError(f"{name} must be a clipup.MoEConfig, got {type(value).__name__}")
