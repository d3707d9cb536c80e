"""Parses the flags of a command and refuses flags that have no effect."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

import tyro
from docstring_parser import parse_from_object

from ..option_group import OptionGroup, option
from ..precision import Precision, check_device, default_workers
from .logs import FLAG_OF

T = TypeVar("T")
ON_SPARSE = "on a model that is already sparse"


@dataclass(kw_only=True)
class DeviceOptions(OptionGroup):
    """Options of a command that runs a model."""

    device: str = "auto"
    """cpu, cuda or cuda:N. auto: cuda if torch finds a GPU, else cpu."""

    def check(self) -> None:
        super().check()
        self.device = check_device(self.device)


@dataclass(kw_only=True)
class BatchOptions(DeviceOptions):
    """Options of a command that reads images."""

    batch_size: int = option(64, least=1)
    """Images or texts per batch."""
    workers: int = option(factory=default_workers, least=0)
    """Processes that read images."""


@dataclass(kw_only=True)
class EncodingOptions(BatchOptions):
    """Options of a command that evaluates a model on images."""

    precision: Precision = "fp32"
    """fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights)."""
    int8: bool = False
    """Quantize experts, MLPs and attention (clipup.accelerate(model, weights="int8")), with fp32 or bf16; --device auto
    is then the CPU, which alone has int8."""

    def check(self) -> None:
        if self.int8 and self.device == "auto":
            self.device = "cpu"
        super().check()
        if self.int8 and (self.precision not in ("fp32", "bf16") or self.device != "cpu"):
            raise ValueError(
                f"int8 needs precision fp32 or bf16 and device cpu, got {self.precision} and {self.device}; pass "
                "--precision bf16 --device cpu"
            )


def parse(options: type[T], argv: Sequence[str], program: str, **kwargs: Any) -> T:
    """Parses a command line with tyro, and checks the options.

    Args:
        kwargs: passed to ``tyro.cli``.

    Raises:
        ValueError: a flag has no effect, or an option is refused.
        SystemExit: --help, an unknown flag, or an invalid value.
    """
    FLAG_OF.clear()
    FLAG_OF.update(flags(options))
    join_help(options)
    if {"-h", "--help"} & set(argv):
        print(_description(options), end="\n\n")  # tyro would not wrap it
    parsed = tyro.cli(options, args=list(argv), prog=program, description="", **kwargs)
    if isinstance(parsed, OptionGroup):
        refuse_idle(argv, parsed.idle())
        parsed.check()
    return parsed


def flags(options: type) -> dict[str, str]:
    """The flags of options by their names, those of groups included. Positional options have none."""
    groups = _groups(options)
    kinds = get_type_hints(options, include_extras=True)
    own = [name for name, kind in kinds.items() if name not in groups and "Positional" not in repr(kind)]
    return dict(ChainMap({name: f"--{name.replace('_', '-')}" for name in own}, *map(flags, groups.values())))


def _groups(options: type) -> dict[str, type]:
    """The fields that are groups of options."""
    hints: dict[str, type] = get_type_hints(options)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def join_help(options: type) -> None:
    """Gives tyro the docstrings of all options as single lines: it keeps the line breaks of those in the source."""
    for group in filter(dataclasses.is_dataclass, options.__mro__):
        for each in parse_from_object(group).params:
            described = group.__dataclass_fields__[each.arg_name]
            text = " ".join((each.description or "").split())
            described.metadata = MappingProxyType({**described.metadata, "help": text})
    for kind in _groups(options).values():
        join_help(kind)


def _description(options: type) -> str:
    """The docstring at the width of the terminal. An example can still be copied: its lines end with a backslash."""
    width = shutil.get_terminal_size().columns - 4  # for backslash and indentation
    wrapped = (
        textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
        for paragraph in inspect.cleandoc(options.__doc__ or "").split("\n\n")
    )
    return "\n\n".join(text.replace("\n", " \\\n  ") if text.startswith("Example:") else text for text in wrapped)


def refuse_idle(argv: Sequence[str], idle: Mapping[str, str]) -> None:
    """
    Args:
        idle: the options that have no effect, by field name, with the reason ("without --moe").

    Raises:
        ValueError: the command line sets some of them.
    """
    set_flags = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    given = {flag[2:].replace("-", "_").removeprefix("no_"): flag for flag in set_flags}  # by the fields that they set
    for why in idle.values():
        if same := [flag for name, flag in given.items() if idle.get(name) == why]:
            raise ValueError(f"{', '.join(same)} {'has' if len(same) == 1 else 'have'} no effect {why}")
