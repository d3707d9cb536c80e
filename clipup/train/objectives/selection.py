"""Which loss a run minimizes. The losses of the sparse layers are not part of it; the step adds them."""

from __future__ import annotations

from dataclasses import fields

from open_clip.coca_model import CoCa
from torch import nn

from ...precision import Precision
from ..parallel.ranks import Ranks
from .coca import CoCaObjective
from .contrastive import ContrastiveObjective
from .distillation import DistillationObjective
from .multi_positive import MultiPositiveObjective
from .objective import Objective
from .options import CoCaLossOptions, LossOptions
from .sigmoid import SigmoidObjective

_BY_OPTION = (SigmoidObjective, MultiPositiveObjective, DistillationObjective)


def selected(options: LossOptions) -> type[Objective]:
    """The objective that the options select for a model without a decoder; that of a teacher takes ``multi_positive``
    too."""
    chosen = [objective for objective in _BY_OPTION if getattr(options, objective.option) not in (None, False)]
    return chosen[-1] if chosen else ContrastiveObjective


def create_objective(options: LossOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
    """The objective that the options and the model select.

    Raises:
        ValueError: the model cannot be trained with it, or an option of another objective is set.
    """
    objective = selected(options)
    if isinstance(model, CoCa):
        if objective.option:
            raise ValueError(
                f"{objective.option} has no captioning loss, which a CoCa's decoder learns from; leave it out"
            )
        objective = CoCaObjective
    else:
        for each in fields(CoCaLossOptions):
            if getattr(options, each.name) != each.default:
                raise ValueError(f"{each.name} has no effect on a model without a decoder, which only a CoCa has")
    has_bias = getattr(model, "logit_bias", None) is not None
    if has_bias not in objective.takes_bias:
        arguments = ", ".join(f"{name}={value:.4g}" for name, value in SigmoidObjective.model_arguments.items())
        raise ValueError(
            f"{objective.option or 'the loss of a CoCa'} {'has no' if has_bias else 'needs a'} logit_bias, and this "
            f"model {'has one' if has_bias else 'none'}. Random weights are created as the loss needs it; "
            f"others have a bias if they are created, in Python, with {arguments}"
        )
    return objective.create(options, model, ranks, precision)
