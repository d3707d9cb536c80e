"""Detects collapsed routers from the routing metrics that a run logs.

A layer's ``load`` and ``dropped`` are averaged over the logged steps among the last 100 (at least over the last 10
logged steps). The layer has collapsed when, in that average,

- few experts are used: the effective number of experts, 1 / sum_e load_e^2, is at most K + (E - K) / 4 (it is K when
  all tokens choose the same K experts, and E when the load is even); or
- most pairs are dropped: at least 60 % of the (token, choice) pairs that the capacity has room for under an even load;
  or
- experts are dead: at least a quarter of them get less than 1 % of an even share each.

The average is over 100 steps because a healthy router can be unbalanced for some dozen steps around the learning rate's
peak. With 8 experts and 2 choices the preset's effective number was 7.7 to 7.9 on the demonstration's model, and 4.2 or
more with four times the learning rate and a fifth of the balance loss; 3.5 counts as collapsed.
"""

from __future__ import annotations

from collections import deque

from torch import nn

from ...moe.config import MoEConfig
from ...moe.layer import moe_layers
from .records import Record

_STEPS, _RECORDS = 100, 10
"""Minimum steps and minimum logged records of an average."""
_USED = 0.25
_DROPPED = 0.6
_DEAD_LOAD, _DEAD = 0.01, 0.25


class CollapseWatch:
    """Finds the collapsed layers in the records of a run, each layer once."""

    def __init__(self, model: nn.Module, reported: list[Record]) -> None:
        """reported: what was reported before the run was resumed."""
        names = {record["layer"] for record in reported}
        self._configs = {name: layer.config for name, layer in moe_layers(model).items() if name not in names}
        self._recent: deque[Record] = deque()

    def observe(self, record: Record) -> list[Record]:
        """A record for each layer that is collapsed at this logged step for the first time: ``step``, ``layer``,
        ``experts``, ``top_k``, and the averages ``effective_experts``, ``dead_experts``, ``dropped``, ``load``."""
        self._recent.append(record)
        last = record["step"] - _STEPS + 1
        while len(self._recent) > _RECORDS and self._recent[1]["step"] <= last:
            self._recent.popleft()
        if len(self._recent) < _RECORDS or self._recent[0]["step"] > last:
            return []
        collapsed = []
        for name, config in [*self._configs.items()]:
            if name not in record["layers"]:  # it does not run in this step
                continue
            averages = self._averages(name, config)
            if _has_collapsed(averages, config):
                del self._configs[name]
                collapsed.append({"step": record["step"], "layer": name, **averages})
        return collapsed

    def _averages(self, name: str, config: MoEConfig) -> Record:
        layers = [record["layers"][name] for record in self._recent if name in record["layers"]]
        load = [sum(shares) / len(layers) for shares in zip(*(layer["load"] for layer in layers), strict=True)]
        return {
            "experts": config.num_experts,
            "top_k": config.top_k,
            "effective_experts": 1 / max(sum(share * share for share in load), 1e-12),
            "dead_experts": sum(share * config.num_experts < _DEAD_LOAD for share in load),
            "dropped": sum(layer["dropped"] for layer in layers) / len(layers),
            "load": load,
        }


def _has_collapsed(averages: Record, config: MoEConfig) -> bool:
    if config.num_experts == config.top_k or sum(averages["load"]) == 0:
        return False
    spare = config.num_experts - config.top_k
    room = 1.0 if config.capacity_factor is None else min(1.0, config.capacity_factor)
    return (
        averages["effective_experts"] <= config.top_k + _USED * spare
        or averages["dropped"] >= 1 - room + _DROPPED * room
        or averages["dead_experts"] >= _DEAD * config.num_experts
    )


def warning(collapsed: list[Record]) -> str:
    """One message about all layers that collapsed at a step."""
    layers = "; ".join(
        "{layer} ({effective_experts:.1f} of {experts} experts are used, {dead_experts} get next to nothing, "
        "{dropped:.0%} of the choices are dropped)".format(**record)
        for record in collapsed
    )
    return (
        f"routing has collapsed at step {collapsed[0]['step']} in {layers}. Experts without tokens learn nothing. "
        "Lower lr, or raise balance_weight; docs/faq.md says what counts as collapsed"
    )
