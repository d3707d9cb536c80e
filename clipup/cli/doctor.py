"""``clipup doctor``: what ``clipup upcycle`` would do with each block of a model; and a check of the kernels."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..moe.config import MoEConfig
from ..moe.options import SparseOptions
from ..option_group import all_idle
from . import WAITING
from .flags import ON_SPARSE, parse, refuse_idle

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True)
class Options(SparseOptions):
    """Shows what upcycle would do with a model: blocks, parameters before and after, what is refused and why. With
    --device, checks the kernels on that device: every op, forward and backward, against plain torch in float64.

    Example: clipup doctor ViT-B-16-SigLIP --towers image

    Example: clipup doctor --device cuda
    """

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """An open_clip model name, or a directory. No weights are loaded."""
    device: str | None = None
    """Check the kernels on this device (cpu, cuda or cuda:N). Exit code 1 if an op fails."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup doctor")
    if (options.model is None) == (options.device is None):
        raise ValueError("pass a MODEL to see what upcycle would do with it, or --device to check its kernels")
    if options.model is None:
        return check_kernels(options)
    from ..models import factory
    from ..moe.layer import moe_layers

    model = factory.create_on_meta(options.model)
    if moe_layers(model):
        refuse_idle(argv, all_idle(MoEConfig, ON_SPARSE))
    findings = examine(options.model, model, options.moe_cfg)
    print(json.dumps(findings, indent=2) if options.json else text(findings))
    return 0


def check_kernels(options: Options) -> int:
    """Checks the kernels of a device and prints the findings; 1 if an op failed."""
    from clipup_kernels.machine import describe_machine
    from clipup_kernels.self_check import check_again, print_check

    from ..precision import check_device

    device = check_device(str(options.device))
    findings = check_again(device) if options.json else print_check(device)
    failed = sum(finding.reason is not None for finding in findings)
    if options.json:
        about = {"machine": describe_machine(device), "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(about | {"failed": failed}, indent=2))
    else:
        waits = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
        print(f"waiting threads: {waits}; programs of your own set it themselves (docs/performance.md)")
    return int(failed > 0)


def examine(name: str, model: nn.Module, config: MoEConfig) -> dict[str, Any]:
    """The findings about a model, which is upcycled in place if possible.

    Returns:
        model: its name. moe: the config. towers: the reports of ``diagnose`` as dicts. upcycles: whether ``upcycle``
        accepts the model with this config. suggestion: the option with which it would; None if there is none or it
        accepts the model. params: parameters. sparse_params, active_params: parameters after upcycling, with the
        suggestion if there is one; None if it cannot be upcycled.
    """
    from ..clip import flops
    from ..clip.towers import with_towers
    from ..moe.layer import moe_layers
    from ..upcycling.diagnose import diagnose
    from ..upcycling.upcycle import upcycle

    config = with_towers(config, model)
    reports, params, is_sparse = diagnose(model, config), _count(model), bool(moe_layers(model))
    accepted = tuple(r.tower for r in reports if r.tower in (config.towers or ()) and not r.refused and not is_sparse)
    upcycles = not is_sparse and not any(report.refused for report in reports)
    if accepted:
        upcycle(model, config.replace(towers=accepted), inplace=True)
    return {
        "model": name,
        "moe": config.to_dict(),
        "towers": [dataclasses.asdict(report) for report in reports],
        "upcycles": upcycles,
        "suggestion": f"--towers {' '.join(accepted)}" if accepted and not upcycles else None,
        "params": params,
        "sparse_params": _count(model) if accepted or is_sparse else None,
        "active_params": flops.count_active(model) if accepted or is_sparse else None,
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def text(findings: dict[str, Any]) -> str:
    """The findings as text: a table per tower, parameters, and a suggestion if upcycling is refused."""
    lines = [line for tower in findings["towers"] for line in (*_tower(tower), "")]
    dense, sparse, active = (findings[name] for name in ("params", "sparse_params", "active_params"))
    after = "" if sparse is None else f"{sparse / 1e6:.1f} M sparse, {active / 1e6:.1f} M active per token"
    if sparse == dense:
        lines.append(f"already sparse; parameters: {after}")
    elif findings["upcycles"]:
        lines.append(f"upcycle accepts it; parameters: {dense / 1e6:.1f} M dense, {after}")
    else:
        lines.append(f"upcycle refuses it; parameters: {dense / 1e6:.1f} M dense")
        lines += [f"suggestion: {findings['suggestion']}; parameters then: {after}"] * bool(findings["suggestion"])
    return "\n".join(lines)


def _tower(report: dict[str, Any]) -> list[str]:
    """A row per group of identical blocks."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, block in enumerate(report["blocks"]):
        extras = ["gated"] * block["gated"] + [f"{block['norm']} norm"] * (block["norm"] is not None)
        mlp = "not read" if block["mlp"] is None else ", ".join([block["mlp"], *extras])
        widths = "" if block["d_model"] is None else f"{block['d_model']}, {block['d_hidden']}"
        row = (block["block"], mlp, widths, block["activation"] or "", block["status"])
        groups.setdefault(row, []).append(index)
    rows = [(_range_text(indices), *row) for row, indices in groups.items()]
    table = [("blocks", "class", "MLP", "widths", "activation", "status"), *rows] if rows else []
    longest = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{report['tower']} tower: {len(report['blocks'])} blocks"]
    lines += ["  " + "  ".join(map(str.ljust, row, longest)).rstrip() for row in table]
    return [*lines, f"  refused: {report['refused']}"] if report["refused"] else lines


def _range_text(indices: list[int]) -> str:
    """ "1, 3 .. 11" for more than three equally spaced indices, otherwise all of them."""
    steps = {b - a for a, b in zip(indices, indices[1:], strict=False)}
    if len(indices) > 3 and len(steps) == 1:
        return f"{indices[0]}, {indices[1]} .. {indices[-1]}"
    return ", ".join(map(str, indices))
