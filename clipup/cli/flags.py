"""Parses the flags of a command and refuses flags that have no effect."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import tyro

from ..checks import check
from ..models import known_models
from ..moe.config import MoEConfig
from .logs import FLAG_OF

T = TypeVar("T")
MOE_FLAGS = tuple(field.name for field in dataclasses.fields(MoEConfig))


class NoEffect(NamedTuple):
    """Options, by field name, that have no effect if ``idle`` is true for the parsed options."""

    names: tuple[str, ...]
    idle: Callable[[Any], bool]
    why: str
    """Completes "--flag has no effect ...": "without --moe"."""


FSDP_RULE = NoEffect(
    ("fsdp_replicas", "fsdp_no_reshard_after_forward", "fsdp_offload_cpu"),
    lambda options: not options.fsdp,
    "without --fsdp",
)
ON_SPARSE = NoEffect(MOE_FLAGS, lambda options: True, "on a model that is already sparse")


def parse(options: type[T], argv: Sequence[str], program: str, rules: Sequence[NoEffect] = (), **kwargs: Any) -> T:
    """Parses a command line with tyro.

    Args:
        kwargs: passed to ``tyro.cli``.

    Raises:
        ValueError: a model does not exist, or a flag has no effect according to one of the rules.
        SystemExit: --help, an unknown flag, or an invalid value.
    """
    FLAG_OF.clear()
    FLAG_OF.update(_flags(options))
    parsed = tyro.cli(options, args=list(argv), prog=program, **kwargs)
    refuse_unknown_models(parsed)
    refuse_idle(argv, parsed, rules)
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


def moe_rules(config_of: Callable[[Any], MoEConfig]) -> list[NoEffect]:
    """Rules for the options of ``MoEConfig``, which ``config_of`` gets from a command's options."""

    def rule(name: str, idle: Callable[[MoEConfig], bool], why: str) -> NoEffect:
        return NoEffect((name,), lambda options: idle(config_of(options)), why)

    return [
        rule("selection_bias_rate", lambda config: config.selection_bias == "none", "without --selection-bias"),
        rule("balance", lambda config: config.balance_weight == 0, "with --balance-weight 0"),
        rule("entropy_threshold", lambda config: config.global_entropy_weight == 0, "without --global-entropy-weight"),
        rule(
            "priority",
            lambda config: config.capacity_factor is None and config.eval_capacity_factor is None,
            "without --capacity-factor or --eval-capacity-factor",
        ),
        rule(
            "padding_aware",
            lambda config: "text" not in (config.towers or ("text",)),
            "without the text tower in --towers",
        ),
    ]


def at_least(options: Any, least: int, *names: str) -> None:
    """
    Raises:
        ValueError: an option, unless it is None, is smaller.
    """
    for name in names:
        value = getattr(options, name)
        check(name, value, value is None or value >= least, f"at least {least}")


def check_int8(int8: bool, precision: str, device: str) -> None:
    """Refuses int8 weights where there are none."""
    if int8 and (precision not in ("fp32", "bf16") or device != "cpu"):
        raise ValueError(
            f"int8 needs precision fp32 or bf16 and device cpu, got {precision} and {device}; pass "
            "--precision bf16 --device cpu"
        )
