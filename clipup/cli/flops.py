"""``clipup flops``: FLOPs and parameters of a model, dense and sparse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from ..moe.config import MoEConfig
from ..moe.options import SparseOptions
from ..option_group import all_idle, option
from .flags import ON_SPARSE, parse, refuse_idle

if TYPE_CHECKING:
    from ..clip.flops import TowerCounts


@dataclass(kw_only=True)
class Options(SparseOptions):
    """Counts the FLOPs of a model for one image and one text of full length (a multiply-add is 2), and its parameters.

    Example: clipup flops ViT-B-16 --moe --json
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """An open_clip model name, or a directory. No weights are loaded."""
    moe: bool = option(False, idle={"without --json": lambda group: not group.json})
    """With --json: count the upcycled model instead of the dense model."""
    json: bool = False
    """Print JSON for one model instead of a table of both: image_gflops, text_gflops (10^9 FLOPs), params,
    active_params."""

    def idle(self) -> dict[str, str]:
        unused = self.json and not self.moe
        return super().idle() | (all_idle(MoEConfig, "on --json without --moe") if unused else {})


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup flops")
    from ..clip.flops import count
    from ..models import factory
    from ..moe.layer import moe_layers
    from ..upcycling.upcycle import upcycle

    config = options.moe_cfg
    model = factory.create_on_meta(options.model)
    is_sparse = bool(moe_layers(model))
    if is_sparse:
        refuse_idle(argv, all_idle(MoEConfig, ON_SPARSE))
    if options.json:
        wanted = upcycle(model, config, inplace=True) if options.moe and not is_sparse else model
        print(json.dumps(count(wanted)._asdict()))
        return 0
    counts = {"MoE" if is_sparse else "dense": count(model)}
    if not is_sparse:
        counts["MoE"] = count(upcycle(model, config, inplace=True))
    print(table(counts))
    return 0


def table(counts: dict[str, TowerCounts]) -> str:
    """A text table with a row per model and, for two models, the ratio of the second to the first."""
    rows = {name: (image, text, image + text, *params) for name, (image, text, *params) in counts.items()}
    lines = [f"{'':<6}{'image GFLOP':>12}{'text GFLOP':>12}{'both':>9}{'params':>11}{'active':>11}"]
    lines += [
        f"{name:<6}{_gflop(image):>12}{_gflop(text):>12}{_gflop(both):>9}{params / 1e6:>9.1f} M{active / 1e6:>9.1f} M"
        for name, (image, text, both, params, active) in rows.items()
    ]
    if len(rows) == 2:
        image, text, both, params, active = (b / a for a, b in zip(*rows.values(), strict=True))
        lines.append(f"{'ratio':<6}{image:>12.2f}{text:>12.2f}{both:>9.2f}{params:>11.2f}{active:>11.2f}")
    return "\n".join(lines)


def _gflop(value: float) -> str:
    """Two decimals; three significant digits below 1."""
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.3g}"
