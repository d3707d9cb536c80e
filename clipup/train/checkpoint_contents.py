"""What the entries of a checkpoint are, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import shown

MOST = 2**53
"""Steps, samples and seconds at most: whole numbers that a float holds exactly."""


def check_contents(state: dict[str, Any], path: Path) -> None:
    """Checks the entries that a run continues from, as far as they are there.

    Raises:
        ValueError: one is something else than it should be.
    """
    for name, (holds, expected) in _ENTRIES.items():
        if name in state and not holds(state[name]):
            raise ValueError(f"{path} is damaged: its {name} is {shown(state[name])}, where {expected} should be")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and abs(value) <= MOST


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= MOST


def _are_conditions(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("options"), dict)
        and _is_count(value.get("world_size"))
        and _is_count(value.get("steps_of_epoch"))
        and isinstance(value.get("order"), dict | None)
    )


def _are_validations(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, tuple | list) and len(one) == 2 and _is_count(one[0]) and isinstance(one[1], dict | None)
        for one in value.values()
    )


def _are_skipped(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(of), dict) and all(map(_is_count, value[of].values())) for of in ("all", "epoch")
    )


def _are_weights(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(weight, Tensor) for weight in value.values())


def check_optimizer(state: dict[str, Any], path: str | Path) -> None:
    """
    Raises:
        ValueError: the checkpoint holds weights alone.
    """
    if not state["optimizer"]:
        raise ValueError(
            f"{path} holds no state of an optimizer to go on with; start from its weights: clipup convert makes a "
            "model directory of it for --model"
        )


def _is_optimizer(value: object) -> bool:
    """An optimizer's state dict; or an empty one, of a checkpoint that is kept for its weights."""
    if not isinstance(value, dict) or not value:
        return isinstance(value, dict)
    groups, states = value.get("param_groups"), value.get("state")
    if not (isinstance(groups, list) and groups and isinstance(states, dict)):
        return False
    return all(isinstance(one, dict) for one in states.values()) and all(map(_is_group, groups))


def _is_group(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(params := value.get("params"), list):
        return False
    names = value.get("param_names")  # open_clip_train's have none
    named = isinstance(names, list) and len(names) == len(params) and all(isinstance(name, str) for name in names)
    return all(map(_is_count, params)) and (names is None or named)


def _are_two_counts(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_count, value))


_COUNT = "a whole number, 0 or more,"
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("epoch", "step", "step_of_epoch", "samples_seen"), (_is_count, _COUNT)),
    "steps_before": (_is_whole, "a whole number"),
    "seconds": (_is_duration, "a duration"),
    "evaluations": (lambda value: value is None or _is_count(value), _COUNT),
    "skipped_steps": (_are_two_counts, "two counts"),
    "skipped_samples": (_are_skipped, "counts of samples"),
    "validated": (_are_validations, "steps and numbers of validations"),
    "conditions": (_are_conditions, "options, world_size, steps_of_epoch and order"),
    "state_dict": (_are_weights, "tensors by name"),
    "optimizer": (_is_optimizer, "the state dict of an optimizer"),
    "finished": (lambda value: isinstance(value, bool), "True or False"),
}
