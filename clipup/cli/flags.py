"""Parses the flags of a command and refuses flags that have no effect."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import tyro

from ..models import known_models
from ..moe.config import MoEConfig
from ..option_group import OptionGroup
from ..precision import Precision, check_device, default_workers
from .logs import FLAG_OF

T = TypeVar("T")
MOE_FLAGS = tuple(field.name for field in dataclasses.fields(MoEConfig))


@dataclass(kw_only=True)
class SparseOptions(OptionGroup):
    """Options of a command that makes a model sparse."""

    moe_cfg: Annotated[MoEConfig, tyro.conf.arg(name="")] = field(default_factory=MoEConfig.clip_up)


@dataclass(kw_only=True)
class DeviceOptions(OptionGroup):
    """Options of a command that runs a model."""

    device: str = "auto"
    """cpu, cuda or cuda:N. auto: cuda if torch finds a GPU, else cpu."""

    def check(self) -> None:
        self.device = check_device(self.device)


@dataclass(kw_only=True)
class EncodingOptions(DeviceOptions):
    """Options of a command that encodes images."""

    precision: Precision = "fp32"
    """fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights)."""
    int8: bool = False
    """Quantize experts, MLPs and attention (clipup.accelerate(model, weights="int8")), with fp32 or bf16; --device auto
    is then the CPU, which alone has int8."""
    batch_size: int = 64
    """Images or texts per batch."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images."""

    def check(self) -> None:
        if self.int8 and self.device == "auto":
            self.device = "cpu"
        super().check()
        self.at_least(0, "workers")
        self.at_least(1, "batch_size")
        if self.int8 and (self.precision not in ("fp32", "bf16") or self.device != "cpu"):
            raise ValueError(
                f"int8 needs precision fp32 or bf16 and device cpu, got {self.precision} and {self.device}; pass "
                "--precision bf16 --device cpu"
            )


class NoEffect(NamedTuple):
    """Options, by field name, that have no effect if ``idle`` is true for the parsed options."""

    names: tuple[str, ...]
    idle: Callable[[Any], bool]
    why: str
    """Completes "--flag has no effect ...": "without --moe"."""


ON_SPARSE = NoEffect(MOE_FLAGS, lambda options: True, "on a model that is already sparse")
MOE_RULES = [
    NoEffect(
        ("selection_bias_rate",),
        lambda options: options.moe_cfg.selection_bias == "none",
        "without --selection-bias",
    ),
    NoEffect(("balance",), lambda options: options.moe_cfg.balance_weight == 0, "with --balance-weight 0"),
    NoEffect(
        ("entropy_threshold",),
        lambda options: options.moe_cfg.global_entropy_weight == 0,
        "without --global-entropy-weight",
    ),
    NoEffect(
        ("priority",),
        lambda options: options.moe_cfg.capacity_factor is None and options.moe_cfg.eval_capacity_factor is None,
        "without --capacity-factor or --eval-capacity-factor",
    ),
    NoEffect(
        ("padding_aware",),
        lambda options: "text" not in (options.moe_cfg.towers or ("text",)),
        "without the text tower in --towers",
    ),
]
TRAIN_RULES = [
    NoEffect(MOE_FLAGS, lambda options: not options.moe, "without --moe, which makes the model sparse"),
    *MOE_RULES,
    NoEffect(
        ("fsdp_replicas", "fsdp_no_reshard_after_forward", "fsdp_offload_cpu"),
        lambda options: not options.fsdp,
        "without --fsdp",
    ),
    NoEffect(
        ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"),
        lambda options: not options.lock_image,
        "without --lock-image",
    ),
    NoEffect(
        ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm"),
        lambda options: not options.lock_text,
        "without --lock-text",
    ),
    NoEffect(("local_loss", "gather_with_grad"), lambda options: options.siglip, "with --siglip"),
]
"""Of training runs, which ``clipup plan`` plans."""


def parse(options: type[T], argv: Sequence[str], program: str, rules: Sequence[NoEffect] = (), **kwargs: Any) -> T:
    """Parses a command line with tyro, and checks the options.

    Args:
        kwargs: passed to ``tyro.cli``.

    Raises:
        ValueError: a model does not exist, a flag has no effect according to one of the rules, or an option is refused.
        SystemExit: --help, an unknown flag, or an invalid value.
    """
    FLAG_OF.clear()
    FLAG_OF.update(_flags(options))
    parsed = tyro.cli(options, args=list(argv), prog=program, **kwargs)
    refuse_unknown_models(parsed)
    refuse_idle(argv, parsed, rules)
    if isinstance(parsed, OptionGroup):
        parsed.check()
    return parsed


def _flags(options: Any) -> dict[str, str]:
    """The flags of options by their names; of groups of options those of the group. Positional ones have none."""
    kinds = get_type_hints(options, include_extras=True)
    groups = {name: getattr(kind, "__origin__", kind) for name, kind in kinds.items()}  # without Annotated
    groups = {name: kind for name, kind in groups.items() if dataclasses.is_dataclass(kind)}
    own = [name for name, kind in kinds.items() if name not in groups and "Positional" not in repr(kind)]
    return dict(ChainMap({name: f"--{name.replace('_', '-')}" for name in own}, *map(_flags, groups.values())))


def refuse_unknown_models(parsed: Any) -> None:
    """
    Raises:
        ValueError: an option names a model that does not exist.
    """
    for option in ("model", "dense", "distill_model"):
        name = getattr(parsed, option, None)
        if isinstance(name, str):
            known_models.check_known(name, known_models.packaged())


def refuse_idle(argv: Sequence[str], parsed: Any, rules: Sequence[NoEffect]) -> None:
    """
    Raises:
        ValueError: a flag has no effect according to one of the rules.
    """
    flags = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    given = {flag[2:].replace("-", "_").removeprefix("no_"): flag for flag in flags}  # by the fields that they set
    for rule in rules:
        idle = [given[name] for name in rule.names if name in given]
        if idle and rule.idle(parsed):
            raise ValueError(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {rule.why}")
